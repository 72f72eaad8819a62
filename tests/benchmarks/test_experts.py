"""The experiment about experts computes what the library does, and nothing but what a row is named after."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qe_dist.core.quantized import QuantizedGroup
from qe_dist.core.sample import Sample
from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import Budget
from qe_dist.methods.compensation.quant_experts import QuantExperts
from qe_dist.methods.quantizers.rtn import RoundToNearest
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.transforms.outlier_smoothing import OutlierSmoothing
from qe_dist.numerics.reference import linear_forward, prepare, route

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))
import experts_model
from experts import REPAIRS, RandomClusters, bundles
from experts_runtime import Group, Routing, Weight, hashed

TOKENS, WIDTH, EXPERTS = 300, 192, 4
ROWS = [row for bundle in bundles() for row in bundle]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["w4a6", "w4a8", "w4a4", "w3a16g64"])
def fitted(request: Any) -> tuple[QuantizedGroup, Tensor, Tensor]:
    """A group, tokens that it was not fitted to, and its weights."""
    from qe_dist.core.spec import InputGroup, LinearSpec
    from qe_dist.methods.base import GroupProblem
    from qe_dist.numerics.stats import GroupStats

    loud = 1 + 20 * (draw(1, WIDTH) > 1.5)
    x, fresh = draw(2, TOKENS, WIDTH) * loud, draw(3, TOKENS, WIDTH) * loud
    weights = {"gate": draw(4, 64, WIDTH) / 14, "up": draw(5, 32, WIDTH) / 14}
    budget = Budget(rank=32)
    quant = QuantExperts(k=64, num_experts=EXPERTS)
    recipe = Recipe(Scheme.parse(request.param), OutlierSmoothing(k=64), RoundToNearest(), quant, budget)
    stats = GroupStats.empty(weights, WIDTH, recipe.needs(), sample_size=TOKENS)
    stats.update(x, x, torch.zeros(TOKENS, dtype=torch.int8), torch.arange(TOKENS))
    specs = tuple(LinearSpec(n, WIDTH, len(w), False, "column") for n, w in weights.items())
    problem = GroupProblem(InputGroup("gate_up", specs, "gate_up"), weights, stats, recipe.scheme)
    return recipe.fit(problem), fresh, torch.cat(list(weights.values()))


def by_library(group: QuantizedGroup, x: Tensor, expert: Tensor) -> Tensor:
    ready = prepare(group.input, x, expert, group.scheme)
    return torch.cat([linear_forward(linear, ready) for linear in group.linears.values()], dim=1)


def by_runtime(group: QuantizedGroup, x: Tensor, full: Tensor, routing: Routing) -> Tensor:
    return Group(group, Weight.of(group), routing, full, salt=7)(x, x, torch.arange(len(x)))


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


ROUNDING = 4e-3
"""Relative: bf16 has eight bits."""


def test_a_routed_group_gives_what_the_library_gives(fitted: tuple[QuantizedGroup, Tensor, Tensor]) -> None:
    group, x, full = fitted
    assert off(by_runtime(group, x, full, "router"), by_library(group, x, route(group.input, x))) < ROUNDING


def test_products_of_codes_are_exact_and_those_of_unrounded_activations_nearly(
    fitted: tuple[QuantizedGroup, Tensor, Tensor],
) -> None:
    group, x, _ = fitted
    bare = replace(group.input, shared_down=None, expert_down=None, router=None)
    linears = {n: replace(q, shared_up=None, expert_up=None) for n, q in group.linears.items()}
    bare_group = replace(group, input=bare, linears=linears)
    wanted = by_library(bare_group, x, None)
    allowed = 1e-5 if group.scheme.act_bits else ROUNDING
    assert off(by_runtime(bare_group, x, wanted, "router"), wanted) < allowed


def test_the_oracle_takes_the_best_expert_of_each_token(fitted: tuple[QuantizedGroup, Tensor, Tensor]) -> None:
    group, x, full = fitted
    exact = x @ full.T
    each = torch.stack([by_library(group, x, torch.full((TOKENS,), e)) for e in range(EXPERTS)])
    errors = (each - exact).norm(dim=2)
    found = (by_runtime(group, x, full, "oracle") - exact).norm(dim=1)
    assert errors.std(dim=0).min() > 0
    assert (found < errors.amin(dim=0) + ROUNDING * exact.norm(dim=1)).all()
    assert found.mean() < 1.01 * errors.amin(dim=0).mean()


def test_random_routing_is_even_and_another_one_in_each_group(fitted: tuple[QuantizedGroup, Tensor, Tensor]) -> None:
    group, x, full = fitted
    expert = hashed(torch.arange(TOKENS), 7, EXPERTS)
    assert off(by_runtime(group, x, full, "random"), by_library(group, x, expert)) < ROUNDING
    keys = torch.randint(2**62, (20_000,), generator=torch.Generator().manual_seed(0))
    one, other = hashed(keys, 1, 8), hashed(keys, 120, 8)
    joint = torch.bincount(one * 8 + other, minlength=64) / len(keys)
    assert (joint - 1 / 64).abs().max() < 0.005


def test_random_clusters_are_of_equal_size_and_follow_the_seed() -> None:
    quant, occurs = RandomClusters(), torch.zeros(5, 96, dtype=torch.bool)
    labels = quant.clusters(occurs, seed=3)
    assert torch.bincount(labels).tolist() == [12] * 8
    assert torch.equal(labels, quant.clusters(occurs, seed=3))
    assert not torch.equal(labels, quant.clusters(occurs, seed=4))


def test_rows_are_told_apart_and_those_of_a_bundle_can_be_walked_together() -> None:
    assert len(set(ROWS)) == len(ROWS)
    for bundle in bundles():
        assert len({(row.scheme, row.quantizer) for row in bundle}) == 1


@pytest.mark.parametrize("name", REPAIRS)
def test_ranks_are_those_of_the_name_on_narrow_layers_too(name: str) -> None:
    recipe = next(row for row in ROWS if row.name == name).recipe(RoundToNearest())
    said = [int(word) for word in name.split() if word.isdigit()]
    assert recipe.budget.rank_for(4096, 576) == (said[0] if said else 64)


@pytest.mark.parametrize("count", [7, 10, 32])
def test_samples_are_spread_over_kinds_that_take_turns(count):
    kinds = ["text", "digits", "charts", "shapes", "tables", "words", "numbers"]
    samples = [Sample(i, f"file:{i}", kinds[i % 7], text="a") for i in range(224)]
    found = experts_model.spread(samples, count)
    assert len({s.index for s in found}) == len(found) == count
    counts = [sum(s.kind == kind for s in found) for kind in kinds]
    assert max(counts) - min(counts) <= 1


def test_samples_of_one_kind_are_evenly_spaced():
    samples = [Sample(i, f"file:{i}", "text", text="a") for i in range(64)]
    assert [s.index for s in experts_model.spread(samples, 10)] == [i * 64 // 10 for i in range(10)]
