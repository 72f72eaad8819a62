"""SERQ against its formulas in float64: flattened inputs, two terms for the loudest channels, and what they gain."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qe_dist.core.quantized import QuantizedGroup
from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import Budget, GroupProblem
from qe_dist.methods.compensation.none import NoCompensation
from qe_dist.methods.compensation.salient import Salient
from qe_dist.methods.quantizers.rtn import RoundToNearest
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.recipes import load_recipe
from qe_dist.methods.transforms.none import NoTransform
from qe_dist.methods.transforms.smoothquant import SmoothQuant
from qe_dist.numerics.grid import dequantize
from qe_dist.numerics.reference import linear_forward, prepare

WIDTH, TOKENS, SALIENT = 192, 400, 16
FLAT, SERQ = SmoothQuant(alpha=1.0), Salient()

Problem = Callable[..., GroupProblem]


def recipe_of(
    compensation: Any = SERQ, scheme: str = "w4a4", transform: Any = FLAT, *, rank: int = 128, factor_bits: int = 4
) -> Recipe:
    """128 of 1536 channels are 16 of 192."""
    budget = Budget(rank=rank, factor_bits=factor_bits, capped=True)
    return Recipe(Scheme.parse(scheme), transform, RoundToNearest(), compensation, budget)


@pytest.fixture(scope="module")
def x(planted: Callable[..., Any]) -> Tensor:
    return planted(TOKENS, WIDTH, always=6, kinds=4, each=6).x


@pytest.fixture(scope="module")
def problem(x: Tensor, problem_for: Problem) -> GroupProblem:
    return problem_for(recipe_of(Salient(share=0.5)), x)


@pytest.fixture(scope="module")
def fitted(problem: GroupProblem) -> QuantizedGroup:
    return recipe_of().fit(problem)


def error_of(recipe: Recipe, problem: GroupProblem) -> float:
    report = recipe.fit(problem).report
    assert report is not None
    assert report.fallbacks == ()
    assert report.error is not None
    return report.error


def test_the_recipe_is_that_of_the_paper() -> None:
    recipe = load_recipe("serq-w4a4")
    assert (recipe.transform, recipe.compensation) == (FLAT, Salient(share=1.0))
    assert recipe.budget == Budget(rank=128, factor_bits=4, capped=True)


def test_flattened_channels_are_all_as_loud(problem: GroupProblem) -> None:
    """s_c = max|x_c|, nothing of the weights."""
    moved = FLAT.fit(problem)
    assert moved.stats.abs_max.amax(dim=0).sub(1).abs().max() < 2**-8  # the scale is bf16


@pytest.mark.parametrize("transform", [NoTransform(), FLAT, SmoothQuant()])
def test_the_salient_channels_are_the_loudest_ones_as_they_came_in(
    problem: GroupProblem, x: Tensor, transform: Any
) -> None:
    group = recipe_of(transform=transform).fit(problem)
    peak = x.abs().amax(dim=0).tolist()
    assert group.input.salient_channels.tolist() == sorted(range(WIDTH), key=lambda c: -peak[c])[:SALIENT]


def two_terms(weight: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """(R, Q(W - R)) by the definition, row by row in float64."""
    term, rest = torch.zeros(len(weight), len(channels)).double(), weight.double().clone()
    for o, row in enumerate(weight.double()):
        step = (row[channels].abs().max() / 7).bfloat16().double()
        term[o] = torch.round(row[channels] / step).clamp(-7, 7) * step
        rest[o, channels] -= term[o]
        step = (rest[o].abs().max() / 7.5).bfloat16().double()
        rest[o] = torch.round(rest[o] / step).clamp(-8, 7) * step
    return term, rest


def test_the_weights_are_two_terms(fitted: QuantizedGroup, problem: GroupProblem) -> None:
    channels = fitted.input.salient_channels.long()
    scale = fitted.input.input_scale[0].float()
    for name, linear in fitted.linears.items():
        term, rest = two_terms(problem.weights[name] * scale, channels)
        assert torch.allclose(linear.salient_columns.dense.double(), term, rtol=1e-6)
        assert torch.allclose(dequantize(linear.codes, linear.scale).double(), rest, rtol=1e-6)


def test_the_second_term_meets_the_rounded_input(fitted: QuantizedGroup, problem: GroupProblem, x: Tensor) -> None:
    channels = fitted.input.salient_channels.long()
    scale = fitted.input.input_scale[0].double()
    moved = x.double() / scale
    step = moved.abs().amax(dim=1, keepdim=True) / 7
    rounded = torch.round(moved / step) * step
    ready = prepare(fitted.input, x, None, Scheme(4, 4))
    for name, linear in fitted.linears.items():
        term, rest = two_terms(problem.weights[name] * scale.float(), channels)
        wanted = rounded @ rest.T + rounded[:, channels] @ term.T
        assert (linear_forward(linear, ready) - wanted).norm() < 1e-3 * wanted.norm()  # a float32 tie of rounding


@pytest.mark.parametrize(("scheme", "top"), [("w4a4", 7), ("w4a6", 31), ("w4a8", 127)])
def test_its_error_is_that_of_the_authors_formulas(problem: GroupProblem, x: Tensor, scheme: str, top: int) -> None:
    """Y = X^_q W^_q + X~_(s,q) Q(R) from the raw input on, in float64; steps and flattening in the bf16 of storage."""
    flat = x.double().abs().amax(dim=0).bfloat16().double()
    loudest = x.abs().amax(dim=0).argsort(descending=True)[:SALIENT]
    moved = x.double() / flat
    step = moved.abs().amax(dim=1, keepdim=True) / top
    rounded = torch.round(moved / step) * step
    wrong = exact = 0.0
    for weight in problem.weights.values():
        term, rest = two_terms(weight.double() * flat, loudest)
        wanted = x.double() @ weight.double().T
        wrong += (rounded @ rest.T + rounded[:, loudest] @ term.T - wanted).square().sum()
        exact += wanted.square().sum()
    assert error_of(recipe_of(scheme=scheme), problem) == pytest.approx(float((wrong / exact).sqrt()), rel=1e-3)


def test_loud_columns_do_not_widen_the_grid_of_the_others(fitted: QuantizedGroup, problem: GroupProblem) -> None:
    alone = recipe_of(NoCompensation()).fit(problem)
    for name, linear in fitted.linears.items():
        assert linear.scale.float().mean() < 0.5 * alone.linears[name].scale.float().mean()


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w4a16", "w3a16g32", "w4a4g32"])
@pytest.mark.parametrize("transform", [NoTransform(), FLAT])
def test_it_is_not_worse_than_without(problem: GroupProblem, scheme: str, transform: Any) -> None:
    without = error_of(recipe_of(NoCompensation(), scheme, transform), problem)
    assert error_of(recipe_of(SERQ, scheme, transform), problem) < without


@pytest.mark.parametrize("scheme", ["w4a4", "w4a16"])
def test_more_salient_channels_leave_less_error(problem: GroupProblem, scheme: str) -> None:
    errors = [error_of(recipe_of(scheme=scheme, rank=rank), problem) for rank in (16, 64, 256, 1536)]
    assert errors == sorted(errors, reverse=True)
    if scheme == "w4a16":
        assert errors[-1] < 0.2 * errors[0]  # all 192 channels have eight bits


def test_on_flattened_inputs_it_beats_flattening_and_plain_rounding_alone(problem: GroupProblem) -> None:
    """Flattening moves all the trouble to the weights; salient columns take it from there. What 4 bits leave of the
    inputs stays."""
    plain, flat = (error_of(recipe_of(NoCompensation(), transform=t), problem) for t in (NoTransform(), FLAT))
    assert error_of(recipe_of(), problem) < 0.9 * min(plain, flat)


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_a_rank_is_shared_out(problem: GroupProblem, share: float, factor_bits: int) -> None:
    """16 in all; an even number of them are channels."""
    group = recipe_of(Salient(share), factor_bits=factor_bits).fit(problem)
    channels = {0.3: 6, 0.5: 8, 1.0: 16}[share]
    assert len(group.input.salient_channels) == channels
    assert (
        group.input.shared_down is None if share == 1 else group.input.shared_down.dense.shape == (16 - channels, 192)
    )
    assert all(x.salient_columns.dense.shape[1] == channels for x in group.linears.values())


def test_the_adapter_repairs_what_the_two_terms_leave(problem: GroupProblem) -> None:
    """Against the tail of the singular values of the error that is left, in the metric of the inputs."""
    group = recipe_of(Salient(share=0.5), "w3a16", factor_bits=16).fit(problem)
    channels, scale = group.input.salient_channels.long(), group.input.input_scale[0].double()
    x = problem.stats.sample.x.double() / scale
    left, repair = [], []
    for name, linear in group.linears.items():
        error = problem.weights[name].double() * scale - dequantize(linear.codes, linear.scale).double()
        error[:, channels] -= linear.salient_columns.dense.double()
        left.append(error)
        repair.append(linear.shared_up.dense.double() @ group.input.shared_down.dense.double())
    best = torch.linalg.svdvals(torch.cat(left) @ x.T)[8:].norm()
    assert ((torch.cat(left) - torch.cat(repair)) @ x.T).norm() < 1.02 * best


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("factor_bits", [4, 8, 16])
@pytest.mark.parametrize("extra_bits", [0.5, 1.5])
def test_a_byte_budget_is_kept_and_nearly_used(
    problem: GroupProblem, share: float, factor_bits: int, extra_bits: float
) -> None:
    budget = Budget(extra_bits=extra_bits, factor_bits=factor_bits)
    group = replace(recipe_of(Salient(share)), budget=budget).fit(problem)
    bare = recipe_of(NoCompensation()).fit(problem)
    stored = 8 * (group.report.bytes - bare.report.bytes) / problem.num_weights
    steps = 2 * factor_bits * (2 + WIDTH / 80) / WIDTH + 0.3 * (share < 1)  # two columns, two ranks, scales of a pair
    assert extra_bits - steps < stored <= extra_bits


def test_a_large_budget_ends_with_all_channels(problem: GroupProblem) -> None:
    group = replace(recipe_of(), budget=Budget(extra_bits=20.0, factor_bits=4)).fit(problem)
    assert sorted(group.input.salient_channels.tolist()) == list(range(WIDTH))
