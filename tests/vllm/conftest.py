"""Checkpoints for all tests with vLLM, made once."""

from pathlib import Path

import pytest

from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.methods.recipes import load_recipe
from tests.vllm.questions import DATA, MODEL, RECIPES


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def checkpoints(folder: Path) -> dict[str, Path]:
    """All recipes in one pass of the calibration."""
    runs = [RunConfig(MODEL, load_recipe(name), DATA / "calibration.jsonl", folder / name) for name in RECIPES]
    local.quantize(*runs)
    return {name: folder / name for name in RECIPES}
