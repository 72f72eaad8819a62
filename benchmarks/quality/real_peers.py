"""AutoRound and llm-compressor on the real language model, on the samples that our recipes are measured on.

    make real peer                                     the model, and both peers' virtual environments
    .venv/bin/python benchmarks/quality/real_peers.py  writes benchmarks/results/real_peers.json; hours on two cores

Each peer runs in a process of its own, one after the other, on the texts of the calibration set, and
`qe_dist.checkpoint.evaluate` measures what it wrote on those of the test set. A checkpoint that is there already is
measured, not made again.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from dense import read_autoround, write_dense, write_llama
from league import beginning
from peers import check_that_activations_are_quantized, encode_samples, measured
from qe_pipelines.evaluate import encode
from qe_pipelines.progress import set_up_logging
from qe_pipelines.results import write_result

from qe_dist.checkpoint.evaluate import evaluate, save_reference
from qe_dist.serve.loading import load_model

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COST = "cost.json"
"""Beside a checkpoint, when it is whole."""


@dataclass(frozen=True)
class Side:
    environment: str
    script: str
    recipes: tuple[str, ...]


SIDES = {
    "AutoRound": Side(
        ".venv-autoround", "autoround_peer.py",
        ("w4a16g64-200", "w4a16g128-200", "w3a16g64-200", "w2a16g64-200", "w4a8g64-200"),
    ),
    "llm-compressor": Side(
        ".venv-peer", "peer.py",
        (
            "gptq-w4a16g64", "awq-w4a16g64", "gptq-w4a8g64", "smoothquant-gptq-w4a8g64", "gptq-w4a8",
            "smoothquant-gptq-w4a8",
        ),
    ),
}  # fmt: skip


class Bench:
    def __init__(self, real: Path, output: Path, threads: int, first: int | None) -> None:
        self.real, self.output, self.threads, self.first = real, output, threads, first
        self.model = real / "lm"
        output.mkdir(parents=True, exist_ok=True)

    def quantize(self, side: str, recipe: str) -> Path:
        """The checkpoint's folder; its cost lies beside the weights."""
        folder = self.output / side / recipe
        if (folder / COST).exists():
            return folder
        calibration, llama = self.output / "calibration.safetensors", self.output / "llama"
        if not calibration.exists():
            encode_samples(self.model, self.real / "data" / "text-calibration.jsonl", calibration)
        if side == "AutoRound" and not llama.exists():
            write_llama(self.model, llama)
        shutil.rmtree(folder, ignore_errors=True)
        own = SIDES[side]
        command: list[str | Path] = [
            ROOT / own.environment / "bin" / "python", HERE / own.script,
            llama if side == "AutoRound" else self.model, folder,
            "--recipe", recipe, "--calibration", calibration, "--threads", str(self.threads),
        ]  # fmt: skip
        cost = measured(command, self.threads, ours=False)
        (folder / COST).write_text(json.dumps(cost, indent=1))
        return folder

    def row(self, side: str, recipe: str) -> dict[str, Any]:
        """Costs and quality of a peer's recipe."""
        folder = self.quantize(side, recipe)
        readable = folder
        if side == "AutoRound":
            readable = self.output / "dense" / recipe
            bits = None if "a16" in recipe else int(recipe.partition("a")[2].partition("g")[0])
            write_dense(self.model, read_autoround(folder), readable, bits)
        arch, examples = encode(self.model, beginning(self.real / "data" / "text-test.jsonl", self.first))
        reference = self.output / f"reference-{self.first or 'all'}"
        if not reference.exists():
            save_reference(load_model(self.model), arch, examples, reference)
        model = load_model(readable)
        if "a16" not in recipe:
            check_that_activations_are_quantized(model, arch, examples, recipe)
        quality = evaluate(model, arch, examples, reference)
        cost = json.loads((folder / COST).read_text())
        return {"side": side, "recipe": recipe, **cost, "quality": quality.summary(), "scores": quality.columns()}


def main(
    side: Annotated[str, typer.Option(help=f"one of {', '.join(SIDES)}; default: both")] = "",
    recipes: Annotated[list[str] | None, typer.Option(help="of that side; default: all")] = None,
    measure: Annotated[bool, typer.Option(help="or only quantize, and measure another time")] = True,
    real: Annotated[Path, typer.Option(help="what `make real` wrote")] = ROOT / "real",
    threads: Annotated[int, typer.Option(help="of each process")] = 1,
    first: Annotated[int | None, typer.Option(help="so many samples of the test set; default: all")] = None,
    output: Annotated[Path, typer.Option(help="where checkpoints go")] = ROOT / "runs" / "real-peers",
    results: Annotated[Path, typer.Option()] = ROOT / "benchmarks" / "results" / "real_peers.json",
) -> None:
    """Quantize and measure; rows that the result holds already and that are not asked for stay in it."""
    set_up_logging(None)
    if side and side not in SIDES:
        raise typer.BadParameter(f"unknown; known are {', '.join(SIDES)}", param_hint="--side")
    torch.set_num_threads(threads)
    bench = Bench(real, output, threads, first)
    rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"] if results.exists() else []
    for one in [side] if side else SIDES:
        for recipe in recipes or SIDES[one].recipes:
            if not measure:
                bench.quantize(one, recipe)
                continue
            row = bench.row(one, recipe)
            rows = [r for r in rows if (r["side"], r["recipe"]) != (one, recipe)] + [row]
            write_result(results, {"threads": threads, "rows": rows})
            quality = row["quality"]
            print(f"{one} {recipe}: KL {quality['kl']:.4f}, perplexity {quality['perplexity']:.2f}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
