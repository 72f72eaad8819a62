"""`qe-dist eval`: measures exact match, perplexity, KL and agreement with a reference, by kind and by modality."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qe_pipelines.models import Revision, folders_at
from qe_pipelines.progress import set_up_logging
from qe_pipelines.reading import SOURCE, reads_samples

COLUMNS = {"accuracy": "exact match", "perplexity": "perplexity", "kl": "KL", "agreement": "agreement"}


@reads_samples
def evaluate(
    model: Annotated[str, typer.Argument(help="model or quantized checkpoint")],
    data: Annotated[str, typer.Option(help=SOURCE)],
    reference: Annotated[str | None, typer.Option(help="model to measure the KL divergence from")] = None,
    revision: Revision = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="block by block, for models that do not fit into memory; needs disk")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, with the numbers of every sample")] = False,
    reading: Any = None,
) -> None:
    """Measure MODEL on questions with known answers and on plain text, with 95 % intervals over the samples."""
    set_up_logging(None)
    from qe_dist.checkpoint.encoded import check_comparable
    from qe_dist.checkpoint.evaluate import measure, save_states
    from qe_dist.checkpoint.quality import too_few
    from qe_dist.serve.loading import check_loadable

    folder, original = folders_at(model, reference, revision)
    arch, examples = encode(folder, data, reading)
    if original is not None:
        check_comparable(examples, original)
        check_loadable(original)
    opened = streamed if stream else loaded
    with tempfile.TemporaryDirectory(prefix="qe-dist-eval-") as temporary:
        work, full = Path(temporary), None
        if original is not None:
            full = save_states(opened(original, arch, work / "between"), examples, work / "reference")
        found = measure(opened(folder, arch, work / "between"), examples, full)
    result = found.summary()
    if as_json:
        typer.echo(json.dumps({**result, "scores": found.columns()}, indent=1))
        return
    console = Console()
    console.print(table_of(result))
    if note := too_few(result["samples"]):
        console.print(note, highlight=False, soft_wrap=True)


def loaded(folder: Path, arch: Any, _: Path) -> Any:
    """Loads the whole model, as transformers runs it. Raises ConfigError when it does not fit into memory."""
    from qe_dist.checkpoint.evaluate import WholeModel
    from qe_dist.checkpoint.memory import check_memory
    from qe_dist.serve.loading import load_model

    check_memory(folder)
    return WholeModel(load_model(folder), arch)


def streamed(folder: Path, arch: Any, work: Path) -> Any:
    """Opens the model to run block after block, with the activations between blocks in files under `work`."""
    import torch

    from qe_dist.checkpoint.stream import StreamedModel
    from qe_dist.serve.blocks import open_blocks

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    source, blocks = open_blocks(folder, arch, device, dtype)
    return StreamedModel(arch, source, blocks, work, device, dtype)


def encoder_of(folder: Path) -> Any:
    """What makes tokens of samples for the model."""
    from qe_dist import archs
    from qe_dist.checkpoint.encoded import read_config

    return archs.for_checkpoint(read_config(folder)).encoder(folder)


def encode(folder: Path, data: Path | str, reading: Any = None) -> tuple[Any, Any]:
    """The architecture, and the samples of a source as the model's own tokenizer and image processor see them. What is
    to be said of them goes to stderr.

    reading: `ReadOptions`; None: the plain ones. Raises ConfigError or CheckpointError for a model that could not be
    loaded, and for a faulty sample.
    """
    from qe_dist.checkpoint.encoded import EncodedSamples
    from qe_dist.data.options import PLAIN
    from qe_dist.serve.loading import check_loadable

    check_loadable(folder)
    examples = EncodedSamples(folder, data, reading or PLAIN)
    for note in examples.notes:
        typer.echo(note, err=True)
    return examples.arch, examples


def table_of(result: dict[str, Any]) -> Table:
    """A row for each kind, each modality and all samples; numbers have their intervals, if there are any."""
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
