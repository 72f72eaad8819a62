"""What the benchmarks of scaling read from a journal, and what they predict of machines that nobody has here."""

import importlib
import json
from pathlib import Path

import pytest

from qe_dist.io.journal import Record

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a file of benchmarks, which are scripts and no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def journal(*events: tuple[float, str]) -> list[Record]:
    return [Record("call", "", elapsed, event, {}) for elapsed, event in events]


def test_times_of_two_waves(benchmark):
    records = journal(
        (1.0, "start"),
        (3.0, "wave"), (7.0, "batch"), (8.0, "batch"), (8.5, "worker"), (9.0, "batch"), (12.0, "block"),
        (13.0, "block"),
        (13.5, "wave"), (15.0, "batch"), (17.0, "batch"), (18.0, "batch"), (20.0, "block"), (21.0, "block"),
        (22.0, "done"),
    )  # fmt: skip
    found = benchmark("scaling").times_of(records, command=30.0)
    assert found.work == 18.0
    assert found.around == 12.0
    assert found.first_batch == 4.0
    assert found.batch == 1.0
    assert found.fit == (13.0 - 9.0) + (21.0 - 18.0)


def test_efficiency_is_one_when_two_workers_need_half(benchmark):
    scaling = benchmark("scaling")
    one = scaling.Times(command=100.0, around=20.0, first_batch=5.0, batch=1.0, fit=10.0)
    two = scaling.Times(command=60.0, around=20.0, first_batch=5.0, batch=0.5, fit=5.0)
    assert scaling.efficiency(one, two) == {"command": pytest.approx(100 / 120), "after start-up": 1.0}


def test_cases_are_the_same_work(benchmark):
    scaling = benchmark("scaling")
    works = [case.work(8, 42) for case in scaling.CASES.values()]
    assert [sum(map(sum, work.waves)) for work in works] == [8, 8, 8]
    assert [len(work.waves) for work in works] == [1, 1, 4]


def test_measured_parts_replace_the_rates(benchmark, monkeypatch, tmp_path):
    schedule = benchmark("schedule")
    monkeypatch.setattr(schedule, "RESULTS", tmp_path)
    assert schedule.slower() == schedule.Slower()
    parts = {
        "load": {"seconds": 9.0, "predicted": 1.0},
        "forward": {"seconds": 3.0, "predicted": 1.0},
        "move": {"seconds": 1.0, "predicted": None},
        "round": {"seconds": 1.0, "predicted": 2.0},
    }
    (tmp_path / "block_cuda.json").write_text(json.dumps({"device": "H100", "parts": parts}))
    found = schedule.slower()
    assert (found.stream, found.fit) == (4.0, 0.5)
    assert "H100" in found.source


def test_more_gpus_are_faster_and_less_used(benchmark):
    schedule = benchmark("schedule")
    link = schedule.Machine().network
    times = [schedule.prediction("72B", gpus, 8192, link, schedule.Slower())[0] for gpus in (1, 8, 64)]
    assert times[0].seconds > times[1].seconds > times[2].seconds
    assert times[0].utilisation > times[1].utilisation > times[2].utilisation


def test_one_gpu_takes_the_work_of_all_blocks(benchmark):
    schedule = benchmark("schedule")
    link, factors = schedule.Machine().network, schedule.Slower()
    shape, blocks = schedule.MODELS["72B"]
    costs = schedule.costs(shape, 8192, link, factors, schedule.Machine())
    time, work = schedule.prediction("72B", 1, 8192, link, factors)
    compute = blocks * (work.batches * costs.forward + sum(costs.fit))
    assert compute < time.seconds < 1.15 * compute
