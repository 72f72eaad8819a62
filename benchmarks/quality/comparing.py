"""What `qe-dist compare` of twelve recipes on the real vision-language model takes: seconds, and memory of a process.

    make real
    python benchmarks/quality/comparing.py      writes benchmarks/results/comparing.json; most of an hour

The checkpoints stay where league.py looks for them, so that its table of test data needs no fit.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from memory import watch  # noqa: E402
from qe_pipelines.results import write_result  # noqa: E402

RECIPES = (
    "rtn-w4a16g64", "gptq-w4a16g64", "gptq+qera-w4a16g64@0.25f4", "lists+gptq+qera-w4a16g64@0.25f4", "gptq-w4a8g64",
    "gptq+qera-w4a8g64@0.25f4", "lists+gptq+qera-w4a8g64@0.25f4", "smoothquant+gptq-w4a6", "masquant-w4a6",
    "qe-paper+gptq-w4a6", "smoothquant+lists+gptq+qera-w4a6g64@0.5f4", "hadamard+gptq+qera-w4a6g64@0.45f4",
)  # fmt: skip


def main(workers: Annotated[int, typer.Option(help="Ray workers")] = 2) -> None:
    real, output = ROOT / "real", ROOT / "runs" / "league" / "vlm"
    output.mkdir(parents=True, exist_ok=True)
    options = {
        "--recipes": ",".join(RECIPES), "--calibration": real / "data" / "calibration.jsonl",
        "--data": real / "data" / "development.jsonl", "--output": output, "--workers": workers,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-m", "qe_pipelines.main", "compare", str(real / "vlm"), *words]
    log = output / "compare.log"
    watched = watch(command, log, interval=0.5)
    if watched.code:
        sys.exit(f"compare ended with {watched.code}: {log.read_text()[-2000:]}")
    result = {
        "recipes": RECIPES, "workers": workers, "cores": os.cpu_count(), "seconds": watched.seconds,
        "largest_process_mib": watched.largest_mib, "peak_mib": watched.peak.total, "peaks_mib": watched.peaks,
    }  # fmt: skip
    write_result(ROOT / "benchmarks" / "results" / "comparing.json", result)


if __name__ == "__main__":
    typer.run(main)
