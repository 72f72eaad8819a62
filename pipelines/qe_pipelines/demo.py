"""`qe-dist demo`: the bundled models, quantized by Quant Experts and its rivals, in one table."""

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qe_pipelines.evaluate import encode
from qe_pipelines.picture import picture
from qe_pipelines.progress import run_view, set_up_logging
from qe_pipelines.results import write_result

MODELS = ("plain", "outlier")
BITS = ("w4a8", "w4a6", "w4a4")
METHODS = {
    "rtn": "plain rounding",
    "aser": "adapter, same rank",
    "qera": "adapter, same bytes",
    "qe-paper": "QE as in the paper",
    "qe": "Quant Experts",
}
COMPARED = {"plain": ("rtn", "qe"), "outlier": tuple(METHODS)}
"""The whole field on the model that needs it, the two ends on the other."""
ACTIVE_RANK = 128
"""Of `qe`: 32 shared and 32 routed directions, 32 shared and 32 routed channels."""
MARKER = ".qe-demo"
SHOWN_KINDS = ("describe", "order", "digit")
SHOWN_BITS = "w4a4"


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    bits: str
    method: str
    bits_per_weight: float
    accuracy: float
    perplexity: float
    kl: float
    seconds: float


def demo(
    models: Annotated[Path, typer.Option(help="folder of the bundled models")] = Path("models"),
    output: Annotated[Path, typer.Option(help="where checkpoints go; emptied first")] = Path("runs/demo"),
    results: Annotated[Path | None, typer.Option(help="also write the numbers to this JSON file")] = None,
    workers: Annotated[int, typer.Option(help="Ray workers")] = 2,
) -> None:
    """Quantize the bundled models at W4A8, W4A6 and W4A4 and compare what is left of them."""
    set_up_logging(None)
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
    with ray_cluster(None, workers):
        for name in MODELS:
            bench = Bench(models / name, models / "data", output / name, workers)
            cases.append(bench.full_precision())
            for bits in BITS:
                cases += bench.methods(bits)
            console.print(table_of([c for c in cases if c.model == name]))
    show_answers(console, models / "outlier", models / "data", output / "outlier")
    seconds = time.perf_counter() - start
    console.print(f"took {seconds:.0f} s; checkpoints are in {output}")
    if results is not None:
        write_result(results, {"seconds": seconds, "cases": [vars(c) for c in cases]})


class Bench:
    """Quantizes and measures one model."""

    def __init__(self, model: Path, data: Path, output: Path, workers: int) -> None:
        from qe_dist.flow.evaluate import predictions
        from qe_dist.serve.loading import load_model

        self.folder, self.data, self.output, self.workers = model, data, output, workers
        self.arch, self.examples = encode(model, data / "evaluation.jsonl")
        self.reference = predictions(load_model(model), self.arch, self.examples)

    def full_precision(self) -> Case:
        from qe_dist.serve.loading import load_model

        return self._case("bf16", "full precision", 16.0, load_model(self.folder), 0.0)

    def methods(self, bits: str) -> list[Case]:
        """All methods to be compared, at one number format. The rivals get what Quant Experts takes: one adapter
        the same active rank, the other, on top of SmoothQuant (without which it is weak), the same bytes."""
        from qe_dist.methods.base import Budget
        from qe_dist.methods.recipes import load_recipe

        recipes = {m: load_recipe(f"{m}-{bits}") for m in METHODS}
        found: dict[str, Case] = {}
        for method in sorted(COMPARED[self.folder.name], key=["rtn", "qe", "qe-paper", "aser", "qera"].index):
            recipe = recipes[method]
            if method == "aser":
                recipe = replace(recipe, budget=Budget(rank=ACTIVE_RANK))
            if method == "qera":
                extra = found["qe"].bits_per_weight - found["rtn"].bits_per_weight
                budget = Budget(extra_bits=extra, factor_bits=recipes["qe"].budget.factor_bits)
                recipe = replace(load_recipe(f"smoothquant-{bits}"), compensation=recipe.compensation, budget=budget)
            found[method] = self._quantized(bits, method, recipe)
        return [found[m] for m in COMPARED[self.folder.name]]

    def _quantized(self, bits: str, method: str, recipe: Any) -> Case:
        from qe_cluster import driver

        from qe_dist.flow.config import RunConfig
        from qe_dist.serve.loading import load_model

        output = self.output / f"{method}-{bits}"
        run = RunConfig(self.folder, recipe, self.data / "calibration.jsonl", output, self.workers)
        with run_view(quiet=False) as view:
            view.console.print(f"{self.folder.name}  {bits}  {METHODS[method]}")
            summary = driver.quantize(run, listen=view.without_lines())
        model = load_model(output)
        return self._case(bits, METHODS[method], summary.bits_per_weight, model, summary.seconds)

    def _case(self, bits: str, method: str, stored: float, model: Any, seconds: float) -> Case:
        from qe_dist.flow.evaluate import evaluate

        q = evaluate(model, self.arch, self.examples, self.reference).summary()
        numbers = (stored, q["accuracy"], q["perplexity"], q["kl"], seconds)
        return Case(self.folder.name, bits, method, *numbers)


def recovered(case: Case, cases: list[Case]) -> dict[str, float]:
    """Share of what plain rounding loses that a method wins back, by KL and by accuracy."""
    full = next(c for c in cases if c.model == case.model and c.bits == "bf16")
    rtn = next(c for c in cases if (c.model, c.bits, c.method) == (case.model, case.bits, METHODS["rtn"]))
    shares = {"kl": 1 - case.kl / rtn.kl}
    if full.accuracy > rtn.accuracy:
        shares["accuracy"] = (case.accuracy - rtn.accuracy) / (full.accuracy - rtn.accuracy)
    return shares


HEADER = ("bits", "method", "bits/weight", "accuracy", "perplexity", "KL", "KL won", "accuracy won")


def cells(case: Case, cases: list[Case]) -> tuple[str, ...]:
    """A case as a row under HEADER."""
    shares = {} if case.bits == "bf16" or case.method == METHODS["rtn"] else recovered(case, cases)
    won = (f"{shares[k]:.0%}" if k in shares else "" for k in ("kl", "accuracy"))
    numbers = (f"{case.bits_per_weight:.2f}", f"{case.accuracy:.1%}", f"{case.perplexity:.3f}", f"{case.kl:.4f}")
    return (case.bits, case.method, *numbers, *won)


def table_of(cases: list[Case]) -> Table:
    table = Table(*HEADER, title=f"the {cases[0].model} model")
    for case in cases:
        table.add_row(*cells(case, cases))
        if case.bits == "bf16" or case.method == METHODS["qe"]:
            table.add_section()
    return table


def show_answers(console: Console, model: Path, data: Path, output: Path) -> None:
    """Three evaluation images with question, expected answer, and what is generated before and after."""
    from qe_dist.io.samples import read_samples
    from qe_dist.serve.loading import load_model

    samples = read_samples(data / "evaluation.jsonl")
    chosen = [next(s for s in samples if s.kind == kind) for kind in SHOWN_KINDS]
    speakers = {
        "full precision": load_model(model),
        f"plain rounding, {SHOWN_BITS}": load_model(output / f"rtn-{SHOWN_BITS}"),
        f"Quant Experts, {SHOWN_BITS}": load_model(output / f"qe-{SHOWN_BITS}"),
    }
    encoder = _encoder(model)
    for sample in chosen:
        console.print(picture(sample.images[0]) if console.color_system else str(sample.images[0]))
        question, expected = (_text(sample.messages[i]) for i in (0, 1))
        console.print(f"[bold]{escape(question)}[/]  expected: {escape(expected)}", highlight=False)
        for name, speaker in speakers.items():
            console.print(f"  {name:>22}: {escape(generate(speaker, encoder, sample))}", highlight=False)


def generate(model: Any, encoder: Any, sample: Any, max_new_tokens: int = 48) -> str:
    """Greedy answer to the sample's last question."""
    from qe_dist.io.samples import load_images

    prompt = encoder.prompt(sample, load_images(sample))
    ids = prompt.input_ids[None].to(model.device)
    vision = {k: v.to(model.device) for k, v in prompt.vision.items()}
    kinds = prompt.modality[None].int().to(model.device)
    out = model.generate(
        input_ids=ids, mm_token_type_ids=kinds, **vision, max_new_tokens=max_new_tokens, do_sample=False
    )
    return encoder.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def _encoder(model: Path) -> Any:
    from qe_dist import archs

    return archs.for_config(json.loads((model / "config.json").read_text())).encoder(model)


def _text(message: Any) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
