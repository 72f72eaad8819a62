"""Everybody is killed at a random moment: every run ends with the bytes of an undisturbed one, and nothing is made
twice. tests/cluster/test_driver.py has in `make test` what does not take minutes."""

import importlib
import tempfile
from pathlib import Path

import pytest

VICTIMS = ("node", "writer", "command twice", "command", "worker", "embedder")


@pytest.mark.ray
@pytest.mark.nightly
def test_whoever_is_killed_the_same_bytes_come_out_and_no_finished_block_is_made_again(monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    chaos = importlib.import_module("chaos")
    with tempfile.TemporaryDirectory(prefix="qe-", dir="/tmp") as folder:  # paths of sockets must be short
        outcomes = list(chaos.benchmark(Path(folder), kills=len(VICTIMS), seed=1))
    assert {o.trial.victim for o in outcomes} == set(VICTIMS)
    for outcome in outcomes:
        assert not outcome.fault, f"{outcome.trial}: {outcome.fault}"
        assert outcome.kills >= 1, f"{outcome.trial}: nobody was killed"
        assert outcome.equal, f"{outcome.trial}: other bytes"
        assert not outcome.written_again, f"{outcome.trial}: finished blocks were made again"
