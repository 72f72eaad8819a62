"""Checkpoints and offline answers for all tests with vLLM, made once."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from qe_dist.flow import local
from qe_dist.flow.config import RunConfig, by_rotation
from qe_dist.methods.recipes import load_recipe
from tests.vllm.generate import Answers, Job, generate
from tests.vllm.questions import CUT, DATA, MODEL, RECIPES, WIDE, prompts

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
"""They import what only vLLM's environment has."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def checkpoints(folder: Path) -> dict[str, Path]:
    """All recipes in one pass of the calibration for each rotation."""
    names, data = (*RECIPES, WIDE), DATA / "calibration.jsonl"
    runs = [RunConfig(MODEL, load_recipe(n), data, folder / n, tensor_parallel_size=CUT.get(n, 1)) for n in names]
    for together in by_rotation(runs):
        local.quantize(*together)
    return {name: folder / name for name in names}


@pytest.fixture(scope="session")
def offline(checkpoints: dict[str, Path], folder: Path) -> Callable[[int], Answers]:
    """For a number of ranks, what every recipe answers to all prompts."""
    jobs = [Job(name, str(path)) for name, path in checkpoints.items()]
    return cache(lambda ranks: generate(jobs, prompts(), ranks, folder))
