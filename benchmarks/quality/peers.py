"""llm-compressor and qe_dist side by side: quality, seconds and peak memory on the bundled models.

    make peer                                     sets up .venv-peer, once
    .venv/bin/python benchmarks/quality/peers.py  writes benchmarks/results/peers.json

Both sides run in a process of their own, one after the other, on the same samples and with the same number of threads;
both checkpoints are loaded by transformers and measured by `qe_dist.checkpoint.evaluate`. What differs:
llm-compressor's tokenizing is not in its time (it cannot, see `peer.py`), and its activation grid is 2^b levels to our
2^b - 1.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from qe_pipelines.evaluate import encode
from qe_pipelines.progress import set_up_logging
from qe_pipelines.results import write_result
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from qe_dist.checkpoint.evaluate import evaluate, save_reference
from qe_dist.serve.loading import load_model

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

RECIPES: dict[str, tuple[str, ...]] = {
    "rtn-w4a16": ("rtn-w4a16",),
    "gptq-w4a16": ("gptq-w4a16", "qe-w4a16"),
    "awq-w4a16": ("awq-w4a16",),
    "gptq-w3a16": ("gptq-w3a16", "qe-w3a16"),
    "smoothquant-gptq-w8a8": ("smoothquant+gptq-w8a8",),
    "smoothquant-gptq-w4a8": ("smoothquant+gptq-w4a8", "qe-w4a8"),
    "smoothquant-gptq-w4a6": ("smoothquant+gptq-w4a6", "qe-w4a6"),
    "smoothquant-down-gptq-w4a6": ("smoothquant+gptq-w4a6",),
    "smoothquant-gptq-w4a4": ("smoothquant+gptq-w4a4", "qe-w4a4"),
    "smoothquant-down-gptq-w4a4": ("smoothquant+gptq-w4a4",),
}
"""Recipes of the peer, and ours that answer them. RTN is the control: both sides should agree."""


def measured(command: list[str | Path], threads: int, ours: bool) -> dict[str, Any]:
    """Runs `peer.py` or `ours.py`; the numbers they print, and the seconds of the whole process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if not ours:
        environment.pop("PYTHONPATH", None)  # another interpreter's packages
    start = time.perf_counter()
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"process_seconds": seconds}


def encode_samples(model: Path, calibration: Path, path: Path) -> Path:
    """Writes the samples as our encoder sees them into a file that needs none of our code."""
    arch, examples = encode(model, calibration)
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = (arch.model_inputs([example], pad=0) for example in examples)
    save_file({f"{i}.{name}": t.contiguous() for i, one in enumerate(inputs) for name, t in one.items()}, path)
    return path


class Bench:
    """Quantizes and measures one model by both sides."""

    def __init__(self, model: Path, peer: Path, calibration: Path, evaluation: Path, output: Path, threads: int):
        self.model, self.peer, self.output, self.threads = model, peer, output, threads
        self.calibration = calibration
        self.arch, self.examples = encode(model, evaluation)
        self.reference = save_reference(load_model(model), self.arch, self.examples, output / "reference")
        self.rows: list[dict[str, Any]] = []

    def run(self, recipes: dict[str, tuple[str, ...]]) -> None:
        encoded = encode_samples(self.model, self.calibration, self.output / "calibration.safetensors")
        for theirs, ours in recipes.items():
            self._row("llm-compressor", self.peer / "bin" / "python", "peer.py", theirs, encoded)
            for name in ours:
                if ("qe_dist", name) not in {(row["side"], row["recipe"]) for row in self.rows}:
                    self._row("qe_dist", Path(sys.executable), "ours.py", name, self.calibration)

    def full_precision(self) -> dict[str, Any]:
        return evaluate(load_model(self.model), self.arch, self.examples, self.reference).summary()

    def _row(self, side: str, python: Path, script: str, recipe: str, calibration: Path) -> None:
        output = self.output / side / recipe
        shutil.rmtree(output, ignore_errors=True)
        command = [python, HERE / script, self.model, output, "--recipe", recipe, "--calibration", calibration]
        cost = measured([*command, "--threads", str(self.threads)], self.threads, side == "qe_dist")
        model = load_model(output)
        if side == "llm-compressor" and not recipe.endswith("a16"):
            check_that_activations_are_quantized(model, self.arch, self.examples, recipe)
        quality = evaluate(model, self.arch, self.examples, self.reference).summary()
        self.rows.append({"model": self.model.name, "side": side, "recipe": recipe, **cost, "quality": quality})


@torch.no_grad()
def check_that_activations_are_quantized(model: Any, arch: Any, examples: Any, recipe: str) -> None:
    """A loader that leaves them alone would flatter the peer, and nothing else would show it."""
    from compressed_tensors.quantization import disable_quantization, enable_quantization

    inputs = arch.model_inputs(examples[:1], pad=0)
    quantized = model(**inputs, use_cache=False).logits
    model.apply(disable_quantization)
    if torch.equal(quantized, model(**inputs, use_cache=False).logits):
        sys.exit(f"{recipe}: the loaded checkpoint does not quantize activations")
    model.apply(enable_quantization)


def table_of(rows: list[dict[str, Any]]) -> Table:
    header = ("model", "side", "recipe", "bits", "accuracy", "perplexity", "KL", "seconds", "CPU seconds", "peak MiB")
    table = Table(*header)
    for row in rows:
        quality = row["quality"]
        numbers = (f"{row['bits_per_weight']:.2f}", f"{quality['accuracy']:.1%}", f"{quality['perplexity']:.3f}")
        cost = [f"{sum(row[k].values()):.1f}" for k in ("seconds", "cpu_seconds")]
        table.add_row(row["model"], row["side"], row["recipe"], *numbers, f"{quality['kl']:.5f}", *cost,
                      f"{row['peak_mib']:.0f}")  # fmt: skip
    return table


def main(
    peer: Annotated[Path, typer.Option(help="virtual environment with llm-compressor")] = ROOT / ".venv-peer",
    models: Annotated[list[Path] | None, typer.Option(help="default: both bundled models")] = None,
    recipes: Annotated[list[str] | None, typer.Option(help="of the peer; default: all")] = None,
    calibration: Annotated[Path, typer.Option()] = ROOT / "models" / "data" / "calibration.jsonl",
    evaluation: Annotated[Path, typer.Option()] = ROOT / "models" / "data" / "evaluation.jsonl",
    threads: Annotated[int, typer.Option(help="of each process")] = 1,
    output: Annotated[Path, typer.Option(help="where checkpoints go")] = ROOT / "runs" / "peers",
    results: Annotated[Path, typer.Option()] = ROOT / "benchmarks" / "results" / "peers.json",
) -> None:
    """Compare with llm-compressor."""
    set_up_logging(None)
    if not (peer / "bin" / "python").exists():
        raise typer.BadParameter(f"{peer} is no virtual environment; `make peer` sets it up", param_hint="--peer")
    unknown = sorted(set(recipes or ()) - set(RECIPES))
    if unknown:
        raise typer.BadParameter(
            f"unknown: {', '.join(unknown)}; known are: {', '.join(RECIPES)}", param_hint="--recipes"
        )
    chosen = {name: RECIPES[name] for name in recipes or RECIPES}
    torch.set_num_threads(threads)
    rows, full = [], {}
    for model in models or [ROOT / "models" / name for name in ("plain", "outlier")]:
        bench = Bench(model, peer, calibration, evaluation, output / model.name, threads)
        full[model.name] = bench.full_precision()
        bench.run(chosen)
        rows += bench.rows
    Console(width=None if sys.stdout.isatty() else 140).print(table_of(rows))
    write_result(results, {"threads": threads, "full_precision": full, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
