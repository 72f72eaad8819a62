"""The matrix products that benchmarks/gpu/work.py counts are those that the code makes."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qe_dist.core.batch import IMAGE
from qe_dist.core.spec import BlockSpec
from qe_dist.methods.base import GroupProblem
from qe_dist.methods.recipes import load_recipe
from qe_dist.numerics.stats import GroupStats

GPU = Path(__file__).parent.parent.parent / "benchmarks" / "gpu"
RECIPE = load_recipe("qe-w4a6")
TOKENS = 300


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", GPU / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def work() -> ModuleType:
    return module("work")


@pytest.fixture(scope="module")
def block(work: ModuleType) -> BlockSpec:
    return work.Shape(hidden=192, intermediate=640, heads=6, kv_heads=2).block()


@pytest.fixture(scope="module")
def problems(block: BlockSpec, normal: Callable[..., torch.Tensor]) -> dict[str, GroupProblem]:
    found = {}
    for i, group in enumerate(block.groups):
        weights = {x.name: normal(i, x.out_features, x.in_features) for x in group.linears}
        stats = GroupStats.empty(weights, block.router_width(group), RECIPE.needs(), TOKENS)
        modality = torch.full((TOKENS,), IMAGE, dtype=torch.int8)
        x, router_x = normal(10 + i, TOKENS, group.in_features), normal(20 + i, TOKENS, block.router_width(group))
        stats.update(x, router_x, modality, torch.arange(TOKENS))
        found[group.name] = GroupProblem(group, weights, stats, RECIPE.scheme)
    return found


def products(call: Callable[[], Any]) -> float:
    def added(_: Any, left: Any, right: Any, **kwargs: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counted:
        call()
    return float(counted.get_total_flops())


def test_the_products_of_a_fit_are_counted_as_they_are_made(
    work: ModuleType, block: BlockSpec, problems: dict[str, GroupProblem]
) -> None:
    load = work.Load(tokens=TOKENS, batch=TOKENS, length=TOKENS, sample=TOKENS, itemsize=4)
    parts = work.work(block, RECIPE, load)
    predicted = sum(parts[n].flop32 + parts[n].rough for n in ("round", "share", "repair", "report"))
    assert products(lambda: RECIPE.fit_block(problems)) == pytest.approx(
        predicted, rel=0.02
    )  # a block shares its ranks


def test_the_products_of_the_statistics_are_counted_as_they_are_made(
    work: ModuleType, block: BlockSpec, problems: dict[str, GroupProblem]
) -> None:
    load = work.Load(tokens=TOKENS, batch=TOKENS)
    group, stats = block.groups[-1], problems["mlp.down"].stats
    modality = torch.full((TOKENS,), IMAGE, dtype=torch.int8)
    x, router_x = torch.ones(TOKENS, group.in_features), torch.ones(TOKENS, block.router_width(group))
    counted = products(lambda: stats.update(x, router_x, modality, torch.arange(TOKENS)))
    assert counted == pytest.approx(work._gram(group.in_features, load).flop)


def test_a_block_goes_through_a_real_stage_and_every_part_is_timed(work: ModuleType) -> None:
    block = module("block")
    shape = work.Shape(hidden=128, intermediate=256, heads=4, kv_heads=2)
    measured = block.measure(shape, "qe-w4a6", "cpu", work.Load(tokens=256, batch=128, length=64, sample=64))
    assert set(measured["parts"]) >= {part for *_, part in block.places(RECIPE)}  # none is a name that nobody calls now
    assert all(part["seconds"] > 0 for part in measured["parts"].values())
