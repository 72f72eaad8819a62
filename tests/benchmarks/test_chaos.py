"""Everybody is killed at a random moment: every run ends with the bytes of an undisturbed one, and nothing is made
twice. `make test` has those victims that tests/cluster/test_driver.py does not have."""

import importlib
import tempfile
from pathlib import Path

import pytest


@pytest.mark.ray
@pytest.mark.parametrize(
    "victims",
    [
        ("node", "writer", "command twice"),
        pytest.param(("node", "writer", "command twice", "command", "worker", "embedder"), marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_whoever_is_killed_the_same_bytes_come_out_and_no_finished_block_is_made_again(victims, monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    chaos = importlib.import_module("chaos")
    with tempfile.TemporaryDirectory(prefix="qe-", dir="/tmp") as folder:  # paths of sockets must be short
        outcomes = list(chaos.benchmark(Path(folder), kills=len(victims), seed=1))
    assert {o.trial.victim for o in outcomes} == set(victims)
    for outcome in outcomes:
        assert not outcome.fault, f"{outcome.trial}: {outcome.fault}"
        assert outcome.kills >= 1, f"{outcome.trial}: nobody was killed"
        assert outcome.equal, f"{outcome.trial}: other bytes"
        assert not outcome.written_again, f"{outcome.trial}: finished blocks were made again"
