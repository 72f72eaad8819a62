"""Checkpoints of the bundled outlier model, made once, of few samples: what they are good for does not matter here."""

from dataclasses import replace
from pathlib import Path

import pytest

from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.methods.recipes import load_recipe
from tests.tiny import MODELS, calibration

OUTLIERS = "gptq+qera-w4a6k64@0.25f4"
ADAPTED = "smoothquant+gptq+qera-w4a6@0.25f4"
ROTATED = "hadamard-w4a16g64"
RECIPES = (
    "rtn-w4a16g64", OUTLIERS, ADAPTED, "qe-extract-w4a6", "lists+gptq+qera-w4a6@0.5", "smoothquant+cross_modal-w4a6",
    "rtn-w4a16g128",
)  # fmt: skip


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All recipes in one pass of the calibration; but the rotated model, made for two ranks, in one of its own."""
    folder = tmp_path_factory.mktemp("serve")
    samples = calibration(folder / "data")
    runs = [
        RunConfig(MODELS / "outlier", load_recipe(name), samples, folder / name, sample_tokens=256) for name in RECIPES
    ]
    local.quantize(*runs)
    local.quantize(replace(runs[0], recipe=load_recipe(ROTATED), output=folder / ROTATED, tensor_parallel_size=2))
    return {name: folder / name for name in (*RECIPES, ROTATED)}
