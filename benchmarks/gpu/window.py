"""Uses a short time on a GPU well: many small measurements, the most valuable first, each in a process of its own.

    python benchmarks/gpu/window.py --seconds 560 --out DIR       on the GPU; again with the same DIR: what is missing
    python benchmarks/gpu/window.py --dry-run --out DIR           tiny, in Triton's interpreter: no GPU is needed

Appends a line to DIR/window.jsonl after each case: its name, `ok`, `failed` or `late`, seconds, and what it measured
or said. A case that fails or hangs costs its own budget and nothing else. A later window takes the cases that have no
`ok` yet, those that failed behind those that were not tried. Kernels are compiled first, on all cores. It needs torch,
Triton and this checkout; transformers for the last case alone, and neither Ray nor vLLM.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESERVE = 3.0
"""Seconds at the end of the window that no case may take: a process that is killed needs some of them."""


@dataclass(frozen=True)
class Case:
    name: str
    """What `window_cases.py` is called with."""
    budget: float
    """Seconds after which it is killed."""
    least: float = 10.0
    """It is not started with less."""


@dataclass(frozen=True)
class Outcome:
    status: str
    """ok, failed, or late: killed."""
    result: Any
    """What it measured, or the end of what it said."""


Run = Callable[[Case, float], Outcome]


def tried(path: Path) -> dict[str, str]:
    """The last status of every case of earlier windows. A line that is cut off is no result."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            found[row["case"]] = row["status"]
        except (ValueError, KeyError):
            continue
    return found


def order(cases: Sequence[Case], before: dict[str, str]) -> list[Case]:
    """As they are given, without those that are done, and with those that failed behind the others."""
    left = [case for case in cases if before.get(case.name) != "ok"]
    return sorted(left, key=lambda case: case.name in before)


def window(
    cases: Sequence[Case], path: Path, seconds: float, run: Run, clock: Callable[[], float] = time.monotonic
) -> dict[str, int]:
    """Runs what fits; how many cases were ok, failed, late, and left for another window."""
    end = clock() + seconds - RESERVE
    counts = {"ok": 0, "failed": 0, "late": 0, "left": 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for case in order(cases, tried(path)):
            start = clock()
            if end - start < case.least:
                counts["left"] += 1  # a shorter one behind it may still fit
                continue
            outcome = run(case, min(case.budget, end - start))
            spent = round(clock() - start, 2)
            row = {"case": case.name, "status": outcome.status, "seconds": spent, "result": outcome.result}
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
            counts[outcome.status] += 1
            print(f"{case.name:34} {outcome.status:6} {spent:6.1f} s, {end - clock():6.1f} s left", flush=True)
    return counts


def in_process(dry: bool) -> Run:
    """Runs a case in a process group of its own, which is killed as a whole."""

    def run(case: Case, budget: float) -> Outcome:
        command = [sys.executable, str(HERE / "window_cases.py"), case.name]
        environment = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if dry else {})
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        process = subprocess.Popen(command, env=environment, **how)
        try:
            said, _ = process.communicate(timeout=budget)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            return Outcome("late", said[-2000:])
        if process.returncode:
            return Outcome("failed", said[-2000:])
        try:
            return Outcome("ok", json.loads(said.splitlines()[-1]))
        except (ValueError, IndexError):
            return Outcome("failed", f"expected JSON on the last line: {said[-2000:]}")

    return run


def plan(cores: int) -> list[Case]:
    """The cases by their value: whether the kernels are right, then how fast what is used most is."""
    shards = max(1, min(cores // 2, 8))
    cases = [Case(f"compile:{shard}/{shards}", 60.0) for shard in range(shards)]
    cases += [Case("rates", 30.0)]
    cases += [Case(f"{kind}:{tile}", 20.0) for kind in ("hazard", "unfinished") for tile in TILES]
    cases += [Case(f"checks:{seed}", 60.0, least=20.0) for seed in range(2)]
    cases += [Case(f"layers:72B:{form}:{repair}:1,16", 40.0) for form in FORMATS for repair in REPAIRS]
    cases += [Case(f"tune:{form}:{tokens}", 45.0) for form in FORMATS for tokens in (1, 16)]
    cases += [Case(f"layers:72B:{form}:{repair}:64,256,1024,4096", 60.0) for form in FORMATS for repair in REPAIRS]
    cases += [Case(f"layers:7B:{form}:shared:1,16,4096", 30.0) for form in FORMATS]
    cases += [Case("stack:1", 40.0), Case("stack:16", 40.0), Case("counters", 60.0)]
    cases += [Case("generate", 120.0, least=60.0)]
    return cases


FORMATS = ("w4a16g128", "w4a8")
REPAIRS = ("bare", "shared", "experts")
TILES = ("64x16x128", "128x16x128", "64x32x128", "64x64x64", "128x128x128", "256x128x64")


def dry_plan() -> list[Case]:
    names = ("compile:0/1", "rates", "hazard:64x16x128", "layers:tiny:w4a8:experts:1,3", "stack:3", "counters")
    return [Case(name, 120.0) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument("--out", type=Path, required=True, help="a folder; results of earlier windows in it are kept")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases in Triton's interpreter, without a GPU")
    given = parser.parse_args()
    cases = dry_plan() if given.dry_run else plan(os.cpu_count() or 1)
    run = in_process(given.dry_run)
    first = [case for case in cases if case.name.startswith("compile")]
    print(window(cases, given.out / "window.jsonl", given.seconds, together(first, run)))


def together(first: Sequence[Case], run: Run) -> Run:
    """`run`, but when the first of some cases is asked for, all of them are started at the same time."""
    from concurrent.futures import Future, ThreadPoolExecutor

    started: dict[str, Future[Outcome]] = {}
    pool = ThreadPoolExecutor(max(1, len(first)))

    def start(case: Case, budget: float) -> Outcome:
        if case not in first:
            return run(case, budget)
        for one in first:
            if one.name not in started:
                started[one.name] = pool.submit(run, one, budget)
        return started[case.name].result()

    return start


if __name__ == "__main__":
    sys.exit(main())
