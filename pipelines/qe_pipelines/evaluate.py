"""`qe-dist eval`: exact match, perplexity, KL and agreement with a reference, by kind of task and by modality."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qe_pipelines.progress import set_up_logging

COLUMNS = {"accuracy": "exact match", "perplexity": "perplexity", "kl": "KL", "agreement": "agreement"}


def evaluate(
    model: Annotated[Path, typer.Argument(help="model or quantized checkpoint")],
    data: Annotated[Path, typer.Option(help="JSON-lines file of samples")],
    reference: Annotated[Path | None, typer.Option(help="model to measure the KL divergence from")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, with the numbers of every sample")] = False,
) -> None:
    """Measure MODEL on questions with known answers and on plain text, with 95 % intervals over the samples."""
    set_up_logging(None)
    from qe_dist.flow.encoded import check_comparable
    from qe_dist.flow.evaluate import evaluate as quality
    from qe_dist.flow.evaluate import save_reference
    from qe_dist.flow.quality import too_few
    from qe_dist.serve.loading import load_model

    arch, examples = encode(model, data)
    if reference is not None:
        check_comparable(examples, reference)
    with tempfile.TemporaryDirectory(prefix="qe-dist-eval-") as folder:
        full = None if reference is None else save_reference(load_model(reference), arch, examples, Path(folder))
        found = quality(load_model(model), arch, examples, full)
    result = found.summary()
    if as_json:
        typer.echo(json.dumps({**result, "scores": found.columns()}, indent=1))
        return
    console = Console()
    console.print(table_of(result))
    if note := too_few(result["samples"]):
        console.print(note, highlight=False, soft_wrap=True)


def encode(folder: Path, data: Path) -> tuple[Any, Any]:
    """The architecture, and the samples of a file as the model's own tokenizer and image processor see them."""
    from qe_dist.flow.encoded import EncodedSamples

    examples = EncodedSamples(folder, data)
    return examples.arch, examples


def table_of(result: dict[str, Any]) -> Table:
    """A row for each kind, each modality and all; numbers with their intervals where there are any."""
    table = Table("samples of", "number", *COLUMNS.values())
    for kind, row in result["kinds"].items():
        table.add_row(f"kind {kind}", *_cells(row))
    table.add_section()
    for modality, row in result["modalities"].items():
        table.add_row(f"modality {modality}", *_cells(row))
    table.add_section()
    table.add_row("all", *_cells(result))
    return table


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def cell(name: str) -> str:
        if name not in row:
            return ""
        found = row["intervals"][name]
        return f"{row[name]:.4f}" + (f" [{found[0]:.4f}, {found[1]:.4f}]" if found else "")

    return (str(row["samples"]), *map(cell, COLUMNS))
