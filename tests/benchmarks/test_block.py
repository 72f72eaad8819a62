"""The matrix products that benchmarks/gpu/work.py counts are those that the code makes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import work
from benchmarks.gpu.block import measure, places
from qe_dist.core.batch import IMAGE
from qe_dist.core.spec import BlockSpec
from qe_dist.methods.base import GroupProblem
from qe_dist.methods.recipes import load_recipe
from qe_dist.numerics.stats import GroupStats

RECIPE = load_recipe("qe-w4a6")
TOKENS = 300


@pytest.fixture(scope="module")
def block() -> BlockSpec:
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
    block: BlockSpec, problems: dict[str, GroupProblem]
) -> None:
    load = work.Load(tokens=TOKENS, batch=TOKENS, length=TOKENS, sample=TOKENS, itemsize=4)
    parts = work.work(block, RECIPE, load)
    predicted = sum(parts[n].flop32 + parts[n].rough for n in ("round", "share", "repair", "report"))
    assert products(lambda: RECIPE.fit_block(problems)) == pytest.approx(
        predicted, rel=0.02
    )  # a block shares its ranks


def test_the_products_of_the_statistics_are_counted_as_they_are_made(
    block: BlockSpec, problems: dict[str, GroupProblem]
) -> None:
    load = work.Load(tokens=TOKENS, batch=TOKENS)
    group, stats = block.groups[-1], problems["mlp.down"].stats
    modality = torch.full((TOKENS,), IMAGE, dtype=torch.int8)
    x, router_x = torch.ones(TOKENS, group.in_features), torch.ones(TOKENS, block.router_width(group))
    counted = products(lambda: stats.update(x, router_x, modality, torch.arange(TOKENS)))
    assert counted == pytest.approx(work._gram(group.in_features, load).flop)


def test_a_block_goes_through_a_real_stage_and_every_part_is_timed() -> None:
    shape = work.Shape(hidden=128, intermediate=256, heads=4, kv_heads=2)
    measured = measure(shape, "qe-w4a6", "cpu", work.Load(tokens=256, batch=128, length=64, sample=64))
    assert set(measured["parts"]) >= {part for *_, part in places(RECIPE)}  # none is a name that nobody calls now
    assert all(part["seconds"] > 0 for part in measured["parts"].values())
