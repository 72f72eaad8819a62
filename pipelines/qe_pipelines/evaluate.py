"""`qe-dist eval`: exact match, perplexity, and KL against a reference, by kind of task."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qe_pipelines.progress import set_up_logging


def evaluate(
    model: Annotated[Path, typer.Argument(help="model or quantized checkpoint")],
    data: Annotated[Path, typer.Option(help="JSON-lines file of samples")],
    reference: Annotated[Path | None, typer.Option(help="model to measure the KL divergence from")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure MODEL on questions with known answers and on plain text."""
    set_up_logging(None)
    from qe_dist.flow.evaluate import evaluate as quality
    from qe_dist.flow.evaluate import predictions
    from qe_dist.serve.loading import load_model

    arch, examples = encode(model, data)
    full = None if reference is None else predictions(load_model(reference), arch, examples)
    result = quality(load_model(model), arch, examples, full).summary()
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    table = Table("kind", "samples", "accuracy", "perplexity", "KL")
    for kind, row in [*result["kinds"].items(), ("all", result)]:
        cells = [f"{row[k]:.4f}" if k in row else "" for k in ("accuracy", "perplexity", "kl")]
        table.add_row(kind, str(row["samples"]), *cells)
    Console().print(table)


def encode(folder: Path, data: Path) -> tuple[Any, list[Any]]:
    """The samples of a file as the model's own tokenizer and image processor see them."""
    from qe_dist import archs
    from qe_dist.core.errors import ConfigError
    from qe_dist.io.samples import load_images, read_samples

    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds no config.json; give a model or a finished checkpoint")
    config = json.loads((folder / "config.json").read_text())
    arch = archs.for_checkpoint(config)
    encoder = arch.encoder(folder)
    return arch, [encoder(s, load_images(s)) for s in read_samples(data)]
