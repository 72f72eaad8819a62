"""What a comparison of many recipes costs beside one of a single recipe, which needs the same pass of statistics.

    python benchmarks/quality/sharing.py          writes benchmarks/results/sharing.json

On the bundled outlier model with two workers, wall seconds: of `qe-dist compare` as a user types it (start of Python
and Ray, fits, evaluation of every checkpoint, plots), and of `driver.quantize` alone, on a Ray that runs already.
The single recipe is `qe`, and for comparison `rtn`, whose fit costs next to nothing.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qe_cluster import driver
from qe_cluster.launch import ray_cluster
from qe_pipelines.progress import set_up_logging
from qe_pipelines.results import write_result
from rich.console import Console
from rich.table import Table

from qe_dist.flow.config import RunConfig
from qe_dist.methods.recipes import load_recipe

ROOT = Path(__file__).parents[2]
MODELS, RESULTS = ROOT / "models", ROOT / "benchmarks" / "results"
CALIBRATION, DATA = (MODELS / "data" / f"{name}.jsonl" for name in ("calibration", "evaluation"))
WORKERS = 2
TARGET = 3.0
TWELVE = ("rtn", "smoothquant", "awq", "mbq", "lqer", "l2qer", "qera", "aser", "serq", "qe-paper", "qe-extract", "qe")
SETS = {"rtn": ("rtn",), "qe": ("qe",), "twelve": TWELVE}


def command_seconds(recipes: Sequence[str], output: Path) -> float:
    """Of `qe-dist compare` in a process of its own."""
    options = {
        "--recipes": ",".join(f"{name}-w4a8" for name in recipes),
        "--calibration": CALIBRATION,
        "--data": DATA,
        "--output": output,
        "--workers": WORKERS,
    }
    words = [str(word) for pair in options.items() for word in pair]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "qe_pipelines.main", "compare", str(MODELS / "outlier"), *words],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def quantize_seconds(recipes: Sequence[str], output: Path) -> float:
    """Of the pass and all fits."""
    runs = [
        RunConfig(MODELS / "outlier", load_recipe(f"{name}-w4a8"), CALIBRATION, output / name, WORKERS)
        for name in recipes
    ]
    return driver.quantize(*runs).seconds


def measure(work: Path) -> dict[str, dict[str, float]]:
    with ray_cluster(None, WORKERS):
        quantize_seconds(("rtn",), work / "warm")  # the first also imports what the workers need
        alone = {name: quantize_seconds(recipes, work / "alone" / name) for name, recipes in SETS.items()}
    whole = {name: command_seconds(recipes, work / "whole" / name) for name, recipes in SETS.items()}
    return {"qe-dist compare": whole, "driver.quantize": alone}


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    return {f"twelve / {name}": seconds["twelve"] / seconds[name] for name in SETS if name != "twelve"}


def table_of(cases: dict[str, dict[str, Any]]) -> Table:
    table = Table("seconds of", *SETS, *next(iter(cases.values()))["ratios"])
    for name, case in cases.items():
        table.add_row(
            name, *(f"{s:.1f}" for s in case["seconds"].values()), *(f"{r:.2f}" for r in case["ratios"].values())
        )
    return table


def main() -> None:
    set_up_logging(None)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as work:
        found = measure(Path(work))
    cases = {name: {"seconds": seconds, "ratios": ratios(seconds)} for name, seconds in found.items()}
    Console(width=None if sys.stdout.isatty() else 110).print(table_of(cases))
    reached = cases["qe-dist compare"]["ratios"]["twelve / qe"]
    print(f"twelve recipes take {reached:.2f} times one; the target is {TARGET:g}")
    write_result(
        RESULTS / "sharing.json",
        {"recipes": TWELVE, "workers": WORKERS, "load_before": load, "target": TARGET, "cases": cases},
    )


if __name__ == "__main__":
    sys.exit(main())
