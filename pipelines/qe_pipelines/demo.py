"""`qe-dist demo`: quantizes the bundled models by Quant Experts and by other methods, and compares them in a table."""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qe_pipelines.cluster import joined
from qe_pipelines.compare import fit
from qe_pipelines.console import TO_QUANTIZE, require
from qe_pipelines.evaluate import encode
from qe_pipelines.measuring import measure
from qe_pipelines.picture import picture
from qe_pipelines.progress import set_up_logging
from qe_pipelines.results import write_result

MODELS = ("plain", "outlier")
BITS = ("w4a8", "w4a6", "w4a4")
METHODS = {
    "rtn": "RTN",
    "smoothquant+gptq": "SmoothQuant + GPTQ",
    "aser": "ASER, rank 64",
    "qe-paper": "QE as in the paper",
    "qe": "Quant Experts",
}
COMPARED = {"plain": ("rtn", "smoothquant+gptq", "qe"), "outlier": tuple(METHODS)}
"""The methods for each model: all of them for the model with outliers."""
MARKER = ".qe-demo"
SHOWN_KINDS = ("describe", "order", "digit")
SHOWN_BITS = "w4a4"


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    bits: str
    method: str
    arithmetic: str
    """What the product executes: `a16` or `int8`."""
    bits_per_weight: float
    accuracy: float
    perplexity: float
    kl: float


def demo(
    models: Annotated[Path, typer.Option(help="folder of the bundled models")] = Path("models"),
    output: Annotated[Path, typer.Option(help="where checkpoints go; emptied first")] = Path("runs/demo"),
    results: Annotated[Path | None, typer.Option(help="also write the numbers to this JSON file")] = None,
    workers: Annotated[int, typer.Option(help="Ray workers")] = 2,
) -> None:
    """Quantize the bundled models at W4A8, W4A6 and W4A4 and compare what is left of them."""
    set_up_logging(None)
    require(*TO_QUANTIZE)
    from qe_cluster.launch import ray_cluster

    from qe_dist.core.errors import ConfigError

    if not (models / "plain" / "config.json").exists():
        raise ConfigError(f"{models} does not hold the bundled models; run from the project's folder or give --models")
    if output.exists() and not (output / MARKER).exists():
        raise ConfigError(f"{output} exists and was not made by the demo; choose another --output")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / MARKER).touch()
    # A pipe has no width; rich would fold the table at 80 columns.
    console, start = Console(width=None if sys.stdout.isatty() else 110), time.perf_counter()
    cases: list[Case] = []
    with ray_cluster(joined(None), workers):
        for name in MODELS:
            console.print(f"{name}: {len(BITS)} number formats, {len(COMPARED[name])} methods")
            own = cases_of(models / name, models / "data", output / name, workers)
            console.print(table_of(own))
            cases += own
    show_answers(console, models / "outlier", models / "data", output / "outlier")
    seconds = time.perf_counter() - start
    console.print(f"took {seconds:.0f} s; checkpoints are in {output}")
    if results is not None:
        write_result(results, {"seconds": seconds, "cases": [vars(c) for c in cases]})


def cases_of(model: Path, data: Path, output: Path, workers: int) -> list[Case]:
    """Quantizes a model by every method at every number format. Returns the case of full precision, then theirs."""
    from qe_dist.checkpoint.evaluate import evaluate
    from qe_dist.flow.config import RunConfig
    from qe_dist.methods.recipes import load_recipe
    from qe_dist.serve.loading import load_model

    arch, examples = encode(model, data / "evaluation.jsonl")
    names = [(bits, method, f"{method}-{bits}") for bits in BITS for method in COMPARED[model.name]]
    runs = [
        RunConfig(model, load_recipe(name), data / "calibration.jsonl", output / name, workers) for _, _, name in names
    ]
    fit(runs)
    full = evaluate(load_model(model), arch, examples).summary()
    cases = [Case(model.name, "bf16", "full precision", "a16", 16.0, full["accuracy"], _of_stories(full), 0.0)]
    for (bits, method, _), run, entry in zip(names, runs, measure(runs, arch, examples), strict=True):
        assert entry.accuracy is not None, "the bundled sets have answers"
        numbers = (entry.bits, entry.accuracy, _of_stories(vars(entry)), entry.kl)
        cases.append(Case(model.name, bits, METHODS[method], run.recipe.scheme.arithmetic, *numbers))
    return cases


def _of_stories(quality: Mapping[str, Any]) -> float:
    return quality["kinds"]["text"]["perplexity"]


def recovered(case: Case, cases: list[Case]) -> dict[str, float]:
    """The share of RTN's loss that a method wins back, by KL and, if RTN loses any, by accuracy."""
    full = next(c for c in cases if c.model == case.model and c.bits == "bf16")
    rtn = next(c for c in cases if (c.model, c.bits, c.method) == (case.model, case.bits, METHODS["rtn"]))
    shares = {"kl": 1 - case.kl / rtn.kl}
    if full.accuracy > rtn.accuracy:
        shares["accuracy"] = (case.accuracy - rtn.accuracy) / (full.accuracy - rtn.accuracy)
    return shares


HEADER = ("bits", "method", "product", "bits/weight", "accuracy", "perplexity", "KL", "KL won", "accuracy won")


def cells(case: Case, cases: list[Case]) -> tuple[str, ...]:
    """A case as a row under HEADER."""
    shares = {} if case.bits == "bf16" or case.method == METHODS["rtn"] else recovered(case, cases)
    won = (f"{shares[k]:.0%}" if k in shares else "" for k in ("kl", "accuracy"))
    numbers = (f"{case.bits_per_weight:.2f}", f"{case.accuracy:.1%}", f"{case.perplexity:.3f}", f"{case.kl:.4f}")
    return (case.bits, case.method, case.arithmetic, *numbers, *won)


def table_of(cases: list[Case]) -> Table:
    table = Table(*HEADER, title=f"the {cases[0].model} model")
    for case in cases:
        table.add_row(*cells(case, cases))
        if case.bits == "bf16" or case.method == METHODS["qe"]:
            table.add_section()
    return table


def show_answers(console: Console, model: Path, data: Path, output: Path) -> None:
    """Prints some evaluation images with question, expected answer, and the answers before and after quantization."""
    from qe_dist import archs
    from qe_dist.data.samples import read_samples
    from qe_dist.serve.loading import load_model

    samples = read_samples(data / "evaluation.jsonl")
    chosen = [next(s for s in samples if s.kind == kind) for kind in SHOWN_KINDS]
    speakers = {
        "full precision": load_model(model),
        f"RTN, {SHOWN_BITS}": load_model(output / f"rtn-{SHOWN_BITS}"),
        f"Quant Experts, {SHOWN_BITS}": load_model(output / f"qe-{SHOWN_BITS}"),
    }
    arch = archs.for_config(json.loads((model / "config.json").read_text()))
    encoder = arch.encoder(model)
    for sample in chosen:
        shown = sample.images[0]
        console.print(picture(shown.path) if shown.path and console.color_system else shown.name)
        question, expected = (_text(sample.messages[i]) for i in (0, 1))
        console.print(f"[bold]{escape(question)}[/]  expected: {escape(expected)}", highlight=False)
        for name, speaker in speakers.items():
            console.print(f"  {name:>22}: {escape(generate(speaker, arch, encoder, sample))}", highlight=False)


def generate(model: Any, arch: Any, encoder: Any, sample: Any, max_new_tokens: int = 48) -> str:
    """Greedy answer to the sample's last question."""
    from qe_dist.data.samples import load_images

    prompt = encoder.prompt(sample, load_images(sample))
    inputs = {k: v.to(model.device) for k, v in arch.model_inputs([prompt], pad=0).items()}
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return encoder.tokenizer.decode(out[0, len(prompt.input_ids) :], skip_special_tokens=True)


def _text(message: Any) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
