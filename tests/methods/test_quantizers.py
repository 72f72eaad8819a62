"""What the options of the weight quantizers do to a whole group; their mathematics is tested in tests/numerics."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import Budget, GroupProblem, Quantizer
from qe_dist.methods.compensation.aser import ASER
from qe_dist.methods.compensation.none import NoCompensation
from qe_dist.methods.quantizers.gptq import GPTQ
from qe_dist.methods.quantizers.obq import OBQ
from qe_dist.methods.quantizers.rtn import RoundToNearest
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.recipes import recipe_from
from qe_dist.methods.transforms.none import NoTransform
from qe_dist.numerics.clipping import clipped_scale
from qe_dist.numerics.gptq import gptq
from qe_dist.numerics.grid import full_range_scale, round_to_grid
from qe_dist.numerics.obq import obq

WIDTH = 96
SCHEMES = ["w4a16", "w3a16g32"]

Build = Callable[..., GroupProblem]
Same = Callable[[Any, Any], bool]


@pytest.fixture(scope="module")
def x(planted: Callable[..., Any], normal: Callable[..., Tensor]) -> Tensor:
    """Tokens whose channels go along with each other, beside those that are loud."""
    return planted(400, WIDTH).x + 2.0 * normal(1, 400, 8) @ normal(2, 8, WIDTH)


def recipe_with(quantizer: Quantizer, scheme: str = "w4a16", compensation: Any = None) -> Recipe:
    return Recipe(
        Scheme.parse(scheme),
        NoTransform(),
        quantizer,
        compensation or NoCompensation(),
        budget=Budget(rank=64, capped=True),
    )


def error(quantizer: Quantizer, scheme: str, x: Tensor, problem_for: Build) -> float:
    recipe = recipe_with(quantizer, scheme)
    report = recipe.fit(problem_for(recipe, x)).report
    assert report.fallbacks == ()
    return report.error


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_step_up_has_less_error(scheme: str, x: Tensor, problem_for: Build) -> None:
    steps = [RoundToNearest(), RoundToNearest(clip=True), GPTQ(), GPTQ(clip=True)]
    errors = [error(step, scheme, x, problem_for) for step in steps]
    assert all(better < 0.97 * worse for worse, better in pairwise(errors))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_options_reach_the_numerics(scheme: str, x: Tensor, problem_for: Build, same: Same) -> None:
    parsed = Scheme.parse(scheme)
    bits, size = parsed.weight_bits, parsed.group_size
    problem = problem_for(recipe_with(GPTQ()), x)
    weight, gram = problem.weights["up"], problem.stats.total_gram
    for quantizer in (GPTQ(), GPTQ(act_order=False), GPTQ(damping=0.1)):
        found = quantizer.fit(weight, problem.stats, parsed)
        wanted = gptq(weight, gram, bits, size, act_order=quantizer.act_order, damping=quantizer.damping)
        assert same((found.codes, found.scale), wanted)
    found = RoundToNearest(clip=True).fit(weight, problem.stats, parsed)
    wanted_scale = clipped_scale(weight, bits, size, gram)
    assert same((found.codes, found.scale), (round_to_grid(weight, wanted_scale, bits), wanted_scale))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_obq_is_that_of_the_numerics_and_gptq_above_its_width(
    scheme: str, x: Tensor, problem_for: Build, same: Same
) -> None:
    parsed = Scheme.parse(scheme)
    problem = problem_for(recipe_with(OBQ()), x)
    weight, gram = problem.weights["up"], problem.stats.total_gram
    narrow, wide = (OBQ(widest=w, above="gptq").fit(weight, problem.stats, parsed) for w in (x.shape[1], 8))
    assert same((narrow.codes, narrow.scale), obq(weight, gram, parsed.weight_bits, parsed.group_size))
    assert same((wide.codes, wide.scale), gptq(weight, gram, parsed.weight_bits, parsed.group_size, act_order=True))


def test_a_layer_too_wide_for_obq_is_refused_by_name() -> None:
    OBQ(widest=8).check_layer("layers.0.mlp.down", 8)
    OBQ(widest=8, above="gptq").check_layer("layers.0.mlp.down", 9)
    with pytest.raises(ConfigError, match=r"layers.0.mlp.down has 9 inputs, and obq takes 8 at most.*above"):
        OBQ(widest=8).check_layer("layers.0.mlp.down", 9)


def test_only_what_looks_at_inputs_asks_for_their_gram_matrix() -> None:
    assert not RoundToNearest().needs().gram
    assert RoundToNearest(clip=True).needs().gram
    assert GPTQ().needs().gram
    assert OBQ().needs().gram


@pytest.mark.parametrize("quantizer", [RoundToNearest(clip=True), GPTQ(), GPTQ(clip=True, act_order=False), OBQ()])
def test_columns_that_a_compensation_carries_are_rounded_as_zero(
    quantizer: Quantizer, x: Tensor, problem_for: Build
) -> None:
    recipe = recipe_with(quantizer, compensation=ASER())
    problem = problem_for(recipe, x)
    exempt = recipe.compensation.exempt(problem)
    assert exempt.numel() > 1
    group = recipe.fit(problem)
    assert group.report.fallbacks == ()
    for linear in group.linears.values():
        assert not linear.codes[:, exempt].any()


@pytest.mark.parametrize("quantizer", [RoundToNearest(clip=True), GPTQ(clip=True), OBQ()])
def test_a_poisoned_gram_matrix_ends_in_plain_rounding(
    quantizer: Quantizer, x: Tensor, problem_for: Build, same: Same
) -> None:
    recipe = recipe_with(quantizer)
    problem = problem_for(recipe, x)
    gram = problem.stats.gram.clone()
    gram[0, 3, 4] = math.nan
    group = recipe.fit(replace(problem, stats=replace(problem.stats, gram=gram)))
    assert "RTN" in group.report.fallbacks[-1]
    plain = recipe_with(RoundToNearest()).fit(problem)
    assert same(group.linears, plain.linears)


def test_too_little_damping_is_mended_by_the_ladder(x: Tensor, problem_for: Build) -> None:
    """A single token makes a Gram matrix of rank one."""
    recipe = recipe_with(GPTQ(damping=0.0))
    report = recipe.fit(problem_for(recipe, x[:1])).report
    assert report.fallbacks[-1] == "solved by 'float64 and 1% damping'"
    assert "damping 0.0" in report.fallbacks[0]


@pytest.mark.parametrize("quantizer", [RoundToNearest(clip=True), GPTQ(False, 0.05, True)])
def test_a_recipe_with_options_is_plain_data_and_back(quantizer: Quantizer) -> None:
    recipe = recipe_with(quantizer)
    assert recipe_from(recipe.describe()) == recipe


@pytest.mark.parametrize("damping", [-0.01, math.inf, math.nan])
def test_damping_that_is_none_is_refused(damping: float) -> None:
    with pytest.raises(ConfigError, match=r"quantizer\.damping .* found"):
        GPTQ(damping=damping)


def test_equal_problems_give_equal_bits_with_all_options(x: Tensor, problem_for: Build, same: Same) -> None:
    recipe = recipe_with(GPTQ(clip=True), "w3a16g32")
    first, second = (recipe.fit(problem_for(recipe, x)).linears for _ in range(2))
    assert same(first, second)
    assert torch.isfinite(first["up"].scale).all()


def test_the_full_range_is_of_signed_scales_and_not_for_a_search_of_positive_ones(
    problem_for: Build, x: Tensor
) -> None:
    problem, scheme = problem_for(recipe_with(RoundToNearest(), "w3a16g32"), x), Scheme.parse("w3a16g32")
    weight = torch.cat(list(problem.weights.values()))
    found = RoundToNearest(full_range=True).fit(weight, problem.stats, scheme)
    assert torch.equal(found.scale, full_range_scale(weight, 3, 32))
    assert torch.equal(found.codes, round_to_grid(weight, found.scale, 3))
    assert (found.scale < 0).any()
    with pytest.raises(ConfigError, match="choose clip or full_range"):
        RoundToNearest(clip=True, full_range=True)
