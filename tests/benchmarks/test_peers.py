"""The comparison with llm-compressor: its table is valid, its costs are real, and both sides agree where they must."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from qe_dist.methods.recipes import load_recipe

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peer"


@pytest.fixture
def quality(monkeypatch):
    """Imports a file of benchmarks/quality, which are scripts and no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "quality")

    return importlib.import_module


def test_every_answer_to_the_peer_is_a_recipe(quality):
    answers = {name for names in quality("peers").RECIPES.values() for name in names}
    schemes = {str(load_recipe(name).scheme) for name in answers}
    assert {"w4a16g128", "w3a16g128", "w8a8", "w4a8", "w4a6", "w4a4"} <= schemes


def test_a_cost_is_one_line_of_json(quality, capsys):
    cost = quality("measured").Cost()
    with cost.of("work"):
        kept = torch.ones(64 * 2**20 // 4)
    cost.print(4.5, ("torch",))
    line = json.loads(capsys.readouterr().out)
    assert line["bits_per_weight"] == 4.5
    assert 0 < line["cpu_seconds"]["work"] < 60 > line["seconds"]["work"] > 0
    assert line["peak_mib"] >= line["imported_mib"]
    assert kept.numel() > 0
    assert line["versions"]["torch"] == torch.__version__


@pytest.mark.nightly
@pytest.mark.skipif(not PEER.exists(), reason="make peer sets it up")
@pytest.mark.filterwarnings("default")
def test_both_sides_round_to_the_same_weights(quality, tmp_path):
    """RTN leaves no choice, so any difference would be one of data, grid, loading or evaluation."""
    data = ROOT / "models" / "data"
    peers = quality("peers")
    bench = peers.Bench(
        ROOT / "models" / "plain", PEER, data / "calibration.jsonl", data / "evaluation.jsonl", tmp_path, 1
    )
    bench.run({"rtn-w4a16": ("rtn-w4a16g128",)})
    theirs, ours = bench.rows
    assert (theirs["side"], ours["side"]) == ("llm-compressor", "qe_dist")
    assert theirs["bits_per_weight"] == ours["bits_per_weight"]
    assert theirs["quality"] == ours["quality"]
