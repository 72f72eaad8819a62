"""What Ray costs a small run: CPU seconds of every process of `qe-dist quantize`, beside one process without Ray.

    python benchmarks/overhead.py [--workers 1]       writes benchmarks/results/overhead.json

The model has six tiny blocks, so that nearly all is start-up. CPU seconds tell more than wall time on a machine that
does other work; both are measured.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
from qe_pipelines.results import write_result
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.tiny import calibration, tiny_model, with_blocks  # noqa: E402

LOCAL = """
import sys
from pathlib import Path
from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.methods.recipes import load_recipe
model, data, output = map(Path, sys.argv[1:])
local.quantize(RunConfig(model, load_recipe("qe-w4a6"), data, output))
"""
SAMPLE_SECONDS = 0.1
KINDS = {
    "gcs_server": "Ray: gcs_server", "raylet": "Ray: raylet", "dashboard": "Ray: dashboard and agents",
    "Agent": "Ray: dashboard and agents", "monitor": "Ray: monitors", "ray::IDLE": "Ray: idle workers",
    "ray::Stage": "worker", "ray::Embed": "embedder", "qe_pipelines": "command", "-c": "one process",
}  # fmt: skip
"""What is found in the title of a process, and how the table calls it."""


def measure(command: list[str]) -> dict[str, Any]:
    """Runs a command. Returns its wall time, and CPU seconds by kind of process."""
    seen: dict[int, tuple[str, float]] = {}
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        for one in (root, *_below(root)):
            try:
                with one.oneshot():
                    spent = one.cpu_times()
                    seen[one.pid] = (_kind(" ".join(one.cmdline())), spent.user + spent.system)
            except psutil.Error:
                continue  # it has just ended; what it was at the last look is kept
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    by_kind: dict[str, float] = defaultdict(float)
    for kind, seconds in seen.values():
        by_kind[kind] += seconds
    return {"seconds": time.monotonic() - begin, "cpu_seconds": dict(by_kind), "processes": len(seen)}


def _below(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.Error:
        return []


def _kind(title: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in title), "other")


def table_of(cases: dict[str, dict[str, Any]]) -> Table:
    table = Table("case", "process", "CPU seconds")
    for name, case in cases.items():
        for kind, seconds in sorted(case["cpu_seconds"].items(), key=lambda item: -item[1]):
            table.add_row(name, kind, f"{seconds:.1f}")
        table.add_row(name, f"all {case['processes']}", f"{sum(case['cpu_seconds'].values()):.1f}")
        table.add_section()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds of quantize on Ray, beside one process.")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = tiny_model(folder / "model", config=with_blocks(6)), calibration(folder / "data", 24)
        quantize = [sys.executable, "-m", "qe_pipelines.main", "quantize", str(model), "--recipe", "qe-w4a6", "--quiet"]
        quantize += ["--calibration", str(data), "--workers", str(args.workers), "--output", str(folder / "ray")]
        cases = {
            "one process": measure([sys.executable, "-c", LOCAL, str(model), str(data), str(folder / "local")]),
            f"quantize, {args.workers} workers": measure(quantize),
        }
    Console().print(table_of(cases))
    one, ray = cases.values()
    ratios = {
        "cpu": sum(ray["cpu_seconds"].values()) / sum(one["cpu_seconds"].values()),
        "seconds": ray["seconds"] / one["seconds"],
    }
    print(f"on Ray: {ratios['cpu']:.1f} times the CPU time, {ratios['seconds']:.1f} times the time")
    write_result(ROOT / "benchmarks" / "results" / "overhead.json", {"cases": cases, "ratios": ratios})


if __name__ == "__main__":
    main()
