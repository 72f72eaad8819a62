"""`qe-dist verify`: what a checkpoint must be, looked at again, each fault by its file or tensor."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from qe_pipelines.progress import set_up_logging


def verify(
    output: Annotated[Path, typer.Argument(help="a finished checkpoint")],
    source: Annotated[Path | None, typer.Option(help="the model it was made of: names and shapes must match")] = None,
) -> None:
    """Check every hash, number, name and shape of OUTPUT, and that it sees its images."""
    set_up_logging(None)
    from qe_dist.core.errors import CheckpointError
    from qe_dist.flow import verify as checks

    checkpoint = checks.Checkpoint.open(output)
    steps = {
        "SHA-256 of every file": checks.check_hashes,
        "every tensor in one file": checks.check_index,
        "every number finite": checks.check_finite,
        "types and shapes": checks.check_layout,
    }
    if source is not None:
        steps[f"every linear of {source}"] = lambda c: checks.check_source(c, source)
    count = 0
    for title, check in steps.items():
        count += _tell(title, check(checkpoint))
    if count == 0:
        count += _tell("images change the answer", _blind(output))
    else:
        typer.echo("skipped  images: a damaged checkpoint is not loaded")
    if count:
        raise CheckpointError(
            f"{output} has {count} faults, listed above; remove its config.json and type the command that made it "
            "again: only what is damaged is made anew"
        )


def _tell(title: str, faults: list[str]) -> int:
    typer.echo(f"{'FAULTS ' if faults else 'ok     '}  {title}")
    for fault in faults:
        typer.echo(f"         {fault}")
    return len(faults)


def _blind(output: Path) -> list[str]:
    """Loads the whole checkpoint, as whoever uses it does."""
    from qe_dist import archs
    from qe_dist.flow.verify import image_effect
    from qe_dist.serve.loading import load_model

    config = json.loads((output / "config.json").read_text())
    if "vision_config" not in config:
        typer.echo("skipped  images: a model of text only")
        return []
    config.pop("quantization_config")
    arch = archs.for_config(config)
    effect = image_effect(load_model(output), arch, arch.encoder(output))
    if effect == 0:
        return ["logits: the same for two different images"]
    return [] if math.isfinite(effect) else ["logits: NaN or Inf"]
