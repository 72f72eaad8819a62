"""What a fit reports of itself, against the same errors in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qe_dist.core.batch import IMAGE, MODALITIES, TEXT
from qe_dist.core.quantized import FitReport, QuantizedGroup
from qe_dist.methods.base import GroupProblem
from qe_dist.methods.recipes import load_recipe

WIDTH, TOKENS = 96, 300


def relative(group: QuantizedGroup, weights: dict[str, Tensor], x: Tensor) -> float:
    """Of a group without scales and routers, activations unrounded."""
    x, wrong, exact = x.double(), 0.0, 0.0
    for name, linear in group.linears.items():
        stored = linear.codes.double() * linear.scale.double()
        if linear.shared_up is not None:
            stored += linear.shared_up.dense.double() @ group.input.shared_down.dense.double()
        wrong += ((weights[name].double() - stored) @ x.T).square().sum()
        exact += (weights[name].double() @ x.T).square().sum()
    return float((wrong / exact).sqrt())


@pytest.mark.parametrize("name", ["rtn-w4a16g96", "qera-w3a16g96", "gptq+qera-w4a16g96@0.5f4"])
def test_errors_on_seen_and_on_held_out_tokens(
    normal: Callable[..., Tensor], problem_for: Callable[..., GroupProblem], name: str
) -> None:
    recipe = load_recipe(name)
    x, unseen = normal(11, TOKENS, WIDTH), normal(12, 40, WIDTH) * 3
    problem = problem_for(recipe, x)
    modality = (torch.arange(40) % 3 == 0).to(torch.int8)
    problem.stats.hold_out(unseen, unseen, modality, torch.arange(40))
    group = recipe.fit(problem)
    report = group.report
    assert isinstance(report, FitReport)
    weights = dict(problem.weights)
    close = {"rel": 1e-4}
    assert report.error == pytest.approx(relative(group, weights, x), **close)
    assert report.held_out_error == pytest.approx(relative(group, weights, unseen), **close)
    assert report.held_out_error_by_modality == {
        MODALITIES[m]: pytest.approx(relative(group, weights, unseen[modality == m]), **close) for m in (TEXT, IMAGE)
    }


def test_where_nothing_is_held_out_nothing_is_said(
    normal: Callable[..., Tensor], problem_for: Callable[..., GroupProblem]
) -> None:
    recipe = load_recipe("rtn-w4a8")
    report = recipe.fit(problem_for(recipe, normal(11, TOKENS, WIDTH))).report
    assert report.error > 0
    assert (report.held_out_error, report.held_out_error_by_modality) == (None, {})


def test_an_adapter_that_is_fitted_to_few_tokens_promises_too_much(
    normal: Callable[..., Tensor], problem_for: Callable[..., GroupProblem]
) -> None:
    """Why both are reported."""
    recipe = load_recipe("gptq+qera-w3a16g96@2f16")
    few, unseen = normal(11, 40, WIDTH), normal(12, 200, WIDTH)
    problem = problem_for(recipe, few)
    problem.stats.hold_out(unseen, unseen, torch.zeros(200, dtype=torch.int8), torch.arange(200))
    report = recipe.fit(problem).report
    assert report.held_out_error > 1.5 * report.error
