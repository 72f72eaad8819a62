"""`qe-dist verify`: checks a finished checkpoint, and names each fault by its file or tensor."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qe_dist.core.errors import CheckFailed, ConfigError
from qe_pipelines.models import Revision, folder_at
from qe_pipelines.progress import set_up_logging

if TYPE_CHECKING:
    from qe_dist.checkpoint.verify import Checkpoint


def verify(
    output: Annotated[Path, typer.Argument(help="a finished checkpoint")],
    source: Annotated[str | None, typer.Option(help="the model it was made of: names and shapes must match")] = None,
    revision: Revision = None,
    tensor_parallel_size: Annotated[
        str | None,
        typer.Option(
            "--tensor-parallel-size",
            "--serving-tp",
            help="ranks that shall serve it, like 1,2,4,8: they must compute what the whole does",
        ),
    ] = None,
) -> None:
    """Check every hash, number, name and shape of OUTPUT, that it sees its images, and how it can be served."""
    set_up_logging(None)
    from qe_dist.checkpoint import verify as checks

    sizes = _sizes(tensor_parallel_size)
    checkpoint = checks.Checkpoint.open(output)
    steps: dict[str, Callable[[checks.Checkpoint], list[str]]] = {
        "SHA-256 of every file": checks.check_hashes,
        "every tensor in one file": checks.check_index,
        "every number finite": checks.check_finite,
        "types and shapes": checks.check_layout,
    }
    if source is not None:
        original = folder_at(source, revision)
        steps[f"every linear of {source}"] = lambda c: checks.check_source(c, original)
    count = 0
    for title, check in steps.items():
        count += _tell(title, check(checkpoint))
    if count == 0:
        count += _check_images(output) + _check_names(output)
        why = _unservable(checkpoint, sizes)
        count += _check_ranks(checkpoint, [size for size in sizes if size not in why])
    else:
        why = {}
        typer.echo("skipped  images, names and tensor parallelism: a damaged checkpoint is not loaded")
    if count:
        raise CheckFailed(
            f"{output} has {count} faults, listed above; remove its config.json and type the command that made it "
            "again: only what is damaged is made anew"
        )
    if why:
        raise CheckFailed(
            f"{output} cannot be served at --tensor-parallel-size {', '.join(map(str, why))}, as said above; serve it "
            "at another size, or quantize with that option, which pads what can be padded"
        )


def _sizes(text: str | None) -> list[int]:
    sizes = [] if text is None else text.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise ConfigError(f"--tensor-parallel-size must be numbers of ranks like 1,2,4,8, found {text!r}")
    return [int(size) for size in sizes]


def _unservable(checkpoint: "Checkpoint", sizes: list[int]) -> dict[int, tuple[str, ...]]:
    """The sizes at which the checkpoint cannot be served, each with its reasons. Prints them."""
    from qe_dist.checkpoint.serving import serving_problems

    why = {size: problems for size in sizes if (problems := serving_problems(checkpoint.config, size))}
    for size, problems in why.items():
        typer.echo(f"no       tensor-parallel size {size} cannot be served")
        for problem in problems:
            typer.echo(f"         {problem}")
    return why


def _check_ranks(checkpoint: "Checkpoint", sizes: list[int]) -> int:
    """Prints what tensor-parallel ranks compute differently than one device, and returns the number of faults. Checks
    all sizes in one pass over the blocks."""
    from qe_dist.checkpoint.tp_check import check_ranks

    faults = list(check_ranks(checkpoint, sizes)) if sizes else []
    return sum(
        _tell(f"tensor-parallel size {size}: ranks agree with the whole", [fault for s, fault in faults if s == size])
        for size in sizes
    )


def _tell(title: str, faults: list[str]) -> int:
    """Prints the result of a check, and returns the number of faults."""
    typer.echo(f"{'FAULTS ' if faults else 'ok     '}  {title}")
    for fault in faults:
        typer.echo(f"         {fault}")
    return len(faults)


def _check_names(output: Path) -> int:
    """Prints which tensors vLLM would look for elsewhere, where it is installed, and returns their number."""
    from qe_dist.serve import vllm_plugin

    try:
        vllm_plugin.check_installed()
    except ConfigError as error:
        typer.echo(f"skipped  names in vLLM: {error}")
        return 0
    from qe_dist.serve.vllm_names import name_faults

    return _tell("names as vLLM's own model maps them", name_faults(output))


def _check_images(output: Path) -> int:
    """Prints whether the logits depend on the image, and returns the number of faults. Loads the whole checkpoint."""
    from qe_dist import archs
    from qe_dist.checkpoint.verify import image_effect
    from qe_dist.serve.loading import load_model

    config = json.loads((output / "config.json").read_text())
    arch = archs.for_checkpoint(config)
    if not arch.has_vision(config):
        typer.echo("skipped  images: a model of text only")
        return 0
    effect = image_effect(load_model(output), arch, arch.encoder(output))
    faults = ["logits: the same for two different images"] if effect == 0 else []
    return _tell("images change the answer", faults if math.isfinite(effect) else ["logits: NaN or Inf"])
