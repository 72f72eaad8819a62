"""Victims that tests/cluster/test_driver.py does not have, at random moments: every run ends with the bytes of an
undisturbed one, and nothing is made twice."""

import importlib
import tempfile
from pathlib import Path

import pytest


@pytest.mark.ray
def test_whoever_is_killed_the_same_bytes_come_out_and_no_finished_block_is_made_again(monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    chaos = importlib.import_module("chaos")
    with tempfile.TemporaryDirectory(prefix="qe-", dir="/tmp") as folder:  # paths of sockets must be short
        outcomes = list(chaos.benchmark(Path(folder), kills=3, seed=1))
    assert {o.trial.victim for o in outcomes} == {"node", "writer", "command twice"}
    for outcome in outcomes:
        assert not outcome.fault, f"{outcome.trial}: {outcome.fault}"
        assert outcome.kills >= 1, f"{outcome.trial}: nobody was killed"
        assert outcome.equal, f"{outcome.trial}: other bytes"
        assert not outcome.written_again, f"{outcome.trial}: finished blocks were made again"
