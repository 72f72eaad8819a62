"""Every method on both bundled models, at five number formats and with up to three calibration sets.

    python benchmarks/quality/league.py    writes benchmarks/results/league.json and docs/league/*.png; half an hour

Rivals are as published, with the weight quantizer that helps them most beside it, and at equal bytes: @0.9 is an
adapter with 0.9 bits per weight. One pass of statistics serves all recipes of a model and seed that rotate alike.
"""

import json
import shutil
import sys
import tempfile
from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from qe_cluster.launch import ray_cluster
from qe_pipelines.compare import fit
from qe_pipelines.entries import Entry, plot
from qe_pipelines.evaluate import encode
from qe_pipelines.measuring import measure
from qe_pipelines.progress import set_up_logging
from qe_pipelines.results import write_result

from qe_dist.flow.config import RunConfig
from qe_dist.flow.evaluate import evaluate
from qe_dist.methods.recipes import load_recipe
from qe_dist.serve.loading import load_model

ROOT = Path(__file__).parent.parent.parent
RESULTS, PLOTS = ROOT / "benchmarks" / "results", ROOT / "docs" / "league"
sys.path.insert(0, str(ROOT / "models"))

SEEDS = {0: 11, 1: 101, 2: 102}
"""Of the league, and of `models/scenes.py`; 11 draws the bundled calibration set."""
WEIGHTS_ONLY = ("w4a16", "w3a16")
BOTH = ("w4a8", "w4a6", "w4a4")
ANYWHERE = (
    "rtn", "gptq", "awq", "awq+gptq", "mbq+gptq", "masquant", "lqer@0.9", "l2qer@0.9", "qera-approx@0.9", "qera@0.9f4",
    "gptq+qera@0.9f4", "aser@0.9", "aser+gptq@0.9", "serq", "qe-paper", "qe@0.1", "qe", "qe@0.5", "qe@0.9",
)  # fmt: skip
WITH_ACTIVATIONS = (
    "smoothquant", "smoothquant+gptq", "hadamard+gptq", "hadamard+smoothquant+gptq", "smoothquant+gptq+qera@0.25f4",
    "smoothquant+gptq+qera@0.9f4", "qe-extract", "outliers",
)  # fmt: skip
OUTLIERS = "gptq-{}k64"
"""Ours without any adapter: not a byte more than GPTQ."""
ENTRY = {field.name for field in fields(Entry)}
CONTENDERS = {
    "gptq", "awq+gptq", "smoothquant+gptq", "hadamard+smoothquant+gptq", "gptq+qera@0.9f4",
    "smoothquant+gptq+qera@0.9f4", "outliers", "qe", "qe@0.9",
}  # fmt: skip
"""Those that are best at some size; they are fitted to every calibration set, the others to the bundled one."""


def names_of(scheme: str, seed: int) -> list[str]:
    """The league's recipes of a number format."""
    methods = ANYWHERE + (WITH_ACTIVATIONS if scheme in BOTH else ("hadamard+gptq",))
    methods = [m for m in methods if seed == 0 or m in CONTENDERS]
    return [OUTLIERS.format(scheme) if m == "outliers" else _named(m, scheme) for m in methods]


def _named(method: str, scheme: str) -> str:
    parts, at, budget = method.partition("@")
    return f"{parts}-{scheme}{at}{budget}"


def main(
    models: Annotated[str, typer.Option(help="of the bundled ones")] = "plain,outlier",
    schemes: Annotated[str, typer.Option(help="number formats")] = ",".join(WEIGHTS_ONLY + BOTH),
    seeds: Annotated[str, typer.Option(help="of the calibration set")] = ",".join(map(str, SEEDS)),
    workers: Annotated[int, typer.Option(help="Ray workers")] = 2,
    result: Annotated[Path, typer.Option(help="JSON file to write")] = RESULTS / "league.json",
) -> None:
    """Fits and measures the whole league; models and seeds that the result holds already and that are not asked for
    stay in it."""
    set_up_logging(None)
    found: dict[str, Any] = json.loads(result.read_text())["models"] if result.exists() else {}
    with tempfile.TemporaryDirectory() as temporary, ray_cluster(None, workers):
        data = {seed: calibration_set(seed, Path(temporary)) for seed in map(int, seeds.split(","))}
        for model in models.split(","):
            folder = ROOT / "models" / model
            encoded = encode(folder, ROOT / "models" / "data" / "evaluation.jsonl")
            full = evaluate(load_model(folder), *encoded).summary()
            for seed, calibration in data.items():
                output = Path(temporary) / model / str(seed)
                names = [name for scheme in schemes.split(",") for name in names_of(scheme, seed)]
                runs = [RunConfig(folder, load_recipe(n), calibration, output / n, workers) for n in names]
                fit(runs)
                others = [e for e in found.get(model, {"entries": []})["entries"] if e["seed"] != seed]
                measured = zip(runs, measure(runs, *encoded), strict=True)
                entries = [
                    *others,
                    *({"seed": seed, "arithmetic": r.recipe.scheme.arithmetic, **vars(e)} for r, e in measured),
                ]
                shutil.rmtree(output)
                found[model] = {"full": full, "entries": entries}
                write_result(result, {"seeds": sorted({e["seed"] for e in entries}), "models": found})
                draw(model, [Entry(**{k: v for k, v in e.items() if k in ENTRY}) for e in entries])


def calibration_set(seed: int, folder: Path) -> Path:
    """The bundled one for seed 0, else one drawn anew."""
    from scenes import write_sets

    if seed == 0:
        return ROOT / "models" / "data" / "calibration.jsonl"
    write_sets(folder / f"data-{seed}", evaluation=0, calibration_seed=SEEDS[seed])
    return folder / f"data-{seed}" / "calibration.jsonl"


def mean_of(entries: list[Entry]) -> list[Entry]:
    """One entry for each recipe, its KL the mean over the seeds."""
    by_recipe: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_recipe[entry.recipe].append(entry)
    return [replace(own[0], kl=sum(e.kl for e in own) / len(own)) for own in by_recipe.values()]


def draw(model: str, entries: list[Entry]) -> None:
    PLOTS.mkdir(parents=True, exist_ok=True)
    for scheme in dict.fromkeys(e.scheme for e in entries):
        own = mean_of([e for e in entries if e.scheme == scheme])
        plot(own, f"{model} model, {scheme}", PLOTS / f"{model}-{scheme}.png")


if __name__ == "__main__":
    typer.run(main)
