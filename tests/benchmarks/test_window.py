"""benchmarks/gpu/window.py spends its time as it says, whatever its cases do."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.conftest import GPU

pytestmark = pytest.mark.usefixtures("gpu_scripts")


@pytest.fixture
def window() -> ModuleType:
    return importlib.import_module("window")


class Clock:
    """And cases that take as long as they are told to, or as they may."""

    def __init__(self, window: ModuleType, takes: dict[str, float]) -> None:
        self.window, self.takes, self.now, self.budgets = window, takes, 0.0, {}

    def __call__(self) -> float:
        return self.now

    def run(self, case, budget: float):
        self.budgets[case.name] = budget
        spent = self.takes[case.name]
        self.now += min(abs(spent), budget)
        if abs(spent) > budget:
            return self.window.Outcome("late", "hangs")
        return self.window.Outcome("failed", "an error") if spent < 0 else self.window.Outcome("ok", {"took": spent})


def lines(path: Path) -> list[tuple[str, str]]:
    return [(row["case"], row["status"]) for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())]


def test_a_case_that_fails_or_hangs_costs_its_own_budget_only(window: ModuleType, tmp_path: Path) -> None:
    cases = [window.Case(name, 40.0) for name in ("first", "hangs", "fails", "last")]
    clock = Clock(window, {"first": 5.0, "hangs": 1e9, "fails": -1.0, "last": 7.0})
    counts = window.window(cases, tmp_path / "w.jsonl", 560.0, clock.run, clock)
    assert lines(tmp_path / "w.jsonl") == [("first", "ok"), ("hangs", "late"), ("fails", "failed"), ("last", "ok")]
    assert counts == {"ok": 2, "failed": 1, "late": 1, "left": 0}
    assert clock.now == 5.0 + 40.0 + 1.0 + 7.0


def test_no_case_goes_beyond_the_window(window: ModuleType, tmp_path: Path) -> None:
    """One that no longer fits is left; a shorter one behind it is not."""
    cases = [window.Case("a", 40.0), window.Case("long", 60.0, least=50.0), window.Case("b", 40.0, least=5.0)]
    clock = Clock(window, {"a": 30.0, "long": 1.0, "b": 1e9})
    counts = window.window(cases, tmp_path / "w.jsonl", 60.0, clock.run, clock)
    assert counts == {"ok": 1, "failed": 0, "late": 1, "left": 1}
    assert clock.budgets == {"a": 40.0, "b": 27.0}
    assert clock.now == 57.0


def test_a_later_window_takes_what_is_missing(window: ModuleType, tmp_path: Path) -> None:
    path, names = tmp_path / "w.jsonl", ("good", "bad", "new")
    cases = [window.Case(name, 40.0) for name in names]
    clock = Clock(window, {"good": 1.0, "bad": -1.0, "new": 1.0})
    window.window(cases[:2], path, 100.0, clock.run, clock)
    path.write_text(path.read_text() + '{"case": "new", "sta')  # the machine went away
    path.write_text(path.read_text() + "\n")
    window.window(cases, path, 100.0, clock.run, clock)
    names_again = [json.loads(line)["case"] for line in path.read_text().splitlines() if line.endswith("}")]
    assert names_again == ["good", "bad", "new", "bad"]
    assert window.tried(path) == {"good": "ok", "bad": "failed", "new": "ok"}


def test_every_planned_case_is_one_that_the_script_knows(window: ModuleType) -> None:
    known = importlib.import_module("window_cases").CASES
    planned = window.plan(16) + window.dry_plan()
    assert {case.name.split(":")[0] for case in planned} == set(known)
    assert len({case.name for case in window.plan(16)}) == len(window.plan(16))
    assert [case.name for case in window.plan(16)[:2]] == ["compile:0/8", "compile:1/8"]


SCRIPT = """
import subprocess, sys, time
if sys.argv[1] == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
if sys.argv[1] == "fails":
    sys.exit("out of memory")
print("a warning")
print('{"seconds": 3}' if sys.argv[1] == "good" else "no JSON")
"""


def test_processes_are_judged_by_what_they_print_and_killed_with_their_children(
    window: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "window_cases.py").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.setattr(window, "HERE", tmp_path)
    run = window.in_process(dry=True)
    found = {name: run(window.Case(name, 1.0), 20.0) for name in ("good", "silent", "fails")}
    assert found["good"] == window.Outcome("ok", {"seconds": 3})
    assert found["silent"].status == found["fails"].status == "failed"
    assert "out of memory" in found["fails"].result
    late = run(window.Case("hangs", 1.0), 3.0)
    assert late.status == "late"
    time.sleep(0.2)
    state = Path(f"/proc/{int(late.result.split()[0])}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_tokens_are_compared_with_exact_sums(window: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = importlib.import_module("window_cases")
    assert cases.hazard("64x16x128") == {"tokens": 20, "wrong": {"a16": 0, "a16g128": 0, "a8": 0}}
    right = cases.linear

    def wrong(*given, **how):
        y = right(*given, **how)
        y[3, 17] += 1000
        return y

    monkeypatch.setattr(cases, "linear", wrong)
    assert cases.hazard("64x16x128")["wrong"]["a16"] == 2  # a token of each of two batches


@pytest.mark.nightly
def test_a_dry_run_does_every_kind_of_case(tmp_path: Path) -> None:
    command = [sys.executable, str(GPU / "window.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "window.jsonl").read_text().splitlines()]
    assert {row["case"].split(":")[0]: row["status"] for row in rows} == dict.fromkeys(
        ("compile", "rates", "hazard", "layers", "stack", "counters"), "ok"
    ), rows
