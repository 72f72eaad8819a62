"""Registers, spills, shared memory, instructions and hazards of the kernels, built ahead of time; needs no GPU.

    python benchmarks/kernels_aot.py                 writes benchmarks/results/kernels_aot.json
    python benchmarks/kernels_aot.py --every         also looks for hazards in every tile that can be chosen
    PYTHONPATH=DIR python benchmarks/kernels_aot.py --capability 90 --out FILE      with the Triton in DIR

DIR: pip install --no-deps --target DIR triton==3.6.0
TRITON_PTXAS_PATH takes another ptxas. The builds are those that tests/kernels/test_aot_*.py hold to their limits; those
of products for Hopper are made once more without `products.finished`, as the compilers would do it.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "pipelines")]

from qe_pipelines.results import write_result  # noqa: E402

from tests.kernels import test_aot_down, test_aot_linear, test_aot_quantize, test_hazards  # noqa: E402
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


def row(case: Case, found: Build, before: Build | None) -> dict[str, Any]:
    return {
        "kernel": case.kernel,
        "case": case.name,
        "capability": case.job.capability,
        "warps": case.job.warps,
        "stages": case.job.stages,
        **numbers(case, found),
        "weights_from_registers": count(found.loop, FROM_REGISTERS) > 0,
        "unfinished": None if before is None else numbers(case, before),
    }


def numbers(case: Case, found: Build) -> dict[str, Any]:
    loop = {(found.loop[0].address, found.loop[-1].address)} if found.loop else set()
    hazards = found.hazards
    inside = [h for h in hazards if any(first <= h.at <= last for first, last in loop)]
    return {
        "registers": found.registers,
        "spills": found.spills,
        "shared": found.shared,
        "instructions": len(found.loop),
        "per_weight": per_weight(case, found),
        "hazards": {"main loop": len(inside), "elsewhere": len(hazards) - len(inside)},
    }


def per_weight(case: Case, found: Build) -> float | None:
    """Instructions of a thread in the main loop for each weight that it unpacks there."""
    constants = case.job.constexprs
    if case.kernel != "linear":
        return None
    return len(found.loop) * 32 * case.job.warps / (constants["BN"] * constants["BK"])


def ptxas() -> str:
    import triton

    said = subprocess.run([triton.knobs.nvidia.ptxas.path, "--version"], capture_output=True, text=True, check=True)
    return said.stdout.split("release ")[1].split(",")[0]


def every() -> dict[str, int]:
    """Hazards in all tiles that `dispatch.heuristic` can choose for Hopper."""
    jobs = list(test_hazards.JOBS.values())
    found = [one for first in range(0, len(jobs), 20) for one in build(jobs[first : first + 20])]
    spilled = sum(one.spills > 0 for one in found)
    return {"builds": len(found), "with hazards": sum(bool(one.hazards) for one in found), "with spills": spilled}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", action="store_true", help="every tile that can be chosen, too")
    parser.add_argument("--capability", type=int, help="of one architecture only: 90")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels_aot.json")
    given = parser.parse_args()
    made = [case for case in cases() if given.capability in (None, case.job.capability)]
    built = build([case.job for case in made])
    hopper = [case for case in made if case.job.capability == 90 and case.kernel in ("linear", "down")]
    unfinished = build([replace(case.job, unfinished=True) for case in hopper])
    before = dict(zip((case.name for case in hopper), unfinished, strict=True))
    rows = [row(case, found, before.get(case.name)) for case, found in zip(made, built, strict=True)]
    result = {"triton": version("triton"), "ptxas": ptxas(), "builds": rows}
    write_result(given.out, result | ({"every": every()} if given.every else {}))


if __name__ == "__main__":
    sys.exit(main())
