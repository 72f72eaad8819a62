"""Registers, spills and shared memory of the kernels, built ahead of time for every architecture; needs no GPU.

    python benchmarks/kernels_aot.py        writes benchmarks/results/kernels_aot.json

The builds are those that tests/kernels/test_aot_*.py hold to their limits.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "pipelines")]

from qe_pipelines.results import write_result  # noqa: E402

from tests.kernels import test_aot_down, test_aot_linear, test_aot_quantize  # noqa: E402
from tests.kernels.aot import FROM_REGISTERS, Build, Job, build, count  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Case:
    kernel: str
    name: str
    job: Job


def cases() -> Iterator[Case]:
    for case in (*test_aot_linear.DECODE_CASES, *test_aot_linear.LARGE_CASES):
        yield Case("linear", str(case), case.job)
    for name, job in test_aot_down.CASES.items():
        yield Case("down", name, job)
    for (_, variant), job in test_aot_quantize.JOBS.items():
        yield Case("quantize", variant, job)


def row(case: Case, found: Build) -> dict[str, Any]:
    return {
        "kernel": case.kernel,
        "case": case.name,
        "capability": case.job.capability,
        "warps": case.job.warps,
        "stages": case.job.stages,
        "registers": found.registers,
        "spills": found.spills,
        "shared": found.shared,
        "weights_from_registers": count(found.loop, FROM_REGISTERS) > 0,
    }


def main() -> None:
    made = list(cases())
    rows = [row(case, found) for case, found in zip(made, build([case.job for case in made]), strict=True)]
    write_result(RESULTS / "kernels_aot.json", {"triton": version("triton"), "builds": rows})


if __name__ == "__main__":
    sys.exit(main())
