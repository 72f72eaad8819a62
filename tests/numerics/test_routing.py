"""The router picks the expert with the smallest predicted error, linear in |x|."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qe_dist.numerics.routing import choose_experts, mean_residual, regress_errors

Normal = Callable[..., Tensor]


def test_the_smallest_score_wins_for_every_token(normal: Normal) -> None:
    x, router = normal(0, 30, 12), normal(1, 5, 12)
    chosen = choose_experts(x, router)
    for token, expert in zip(x.double(), chosen.tolist(), strict=True):
        scores = [sum(abs(value) * weight for value, weight in zip(token, row, strict=True)) for row in router.double()]
        assert scores[expert] == min(scores)


def test_ties_go_to_the_lower_expert() -> None:
    router = torch.tensor([[2.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    assert choose_experts(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), router).tolist() == [1, 0, 0]


def test_only_the_magnitude_of_the_input_counts(normal: Normal) -> None:
    x, router = normal(2, 30, 12), normal(3, 5, 12)
    assert torch.equal(choose_experts(x, router), choose_experts(-x, router))


def test_a_bf16_router_is_read_in_float32(normal: Normal) -> None:
    x, router = normal(4, 30, 12), normal(5, 5, 12).bfloat16()
    assert torch.equal(choose_experts(x, router), choose_experts(x, router.float()))


def test_mean_residual_is_the_mean_over_outputs() -> None:
    residual = torch.tensor([[1.0, -2.0, 0.0], [-3.0, 2.0, 1.0]])
    assert mean_residual(residual).tolist() == [2.0, 2.0, 0.5]


def test_mean_residual_bounds_the_mean_error_of_any_token(normal: Normal) -> None:
    residual, x = normal(6, 16, 12), normal(7, 50, 12)
    bound = x.abs() @ mean_residual(residual)
    assert ((x @ residual.T).abs().mean(dim=1) <= bound * (1 + 1e-6)).all()


def test_regression_recovers_a_linear_truth(normal: Normal) -> None:
    """Up to what is common to all experts, which decides nothing."""
    x, truth = normal(8, 200, 12), normal(9, 4, 12).abs()
    errors = x.abs() @ truth.T
    router = regress_errors(x, errors, damping=1e-9)
    centred = truth - truth.mean(dim=0)
    assert (router - centred).abs().max() < 1e-4  # errors are float32
    assert torch.equal(choose_experts(x, router), errors.argmin(dim=1))


def test_regression_is_the_damped_least_squares_solution(normal: Normal) -> None:
    """Against numpy's idea of ridge: extra rows sqrt(damping * mean diagonal) I with target zero."""
    x, errors = normal(10, 60, 8), normal(11, 60, 3).abs()
    magnitude = x.abs().double()
    target = errors.double() - errors.double().mean(dim=1, keepdim=True)
    ridge = (0.05 * magnitude.square().sum() / 8).sqrt()
    rows = torch.cat([magnitude, ridge * torch.eye(8, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, torch.cat([target, torch.zeros(8, 3, dtype=torch.float64)])).solution.T
    assert (regress_errors(x, errors, damping=0.05) - wanted).abs().max() < 1e-6 * wanted.abs().max() + 1e-7


def test_what_a_token_costs_every_expert_does_not_matter(normal: Normal) -> None:
    x, errors = normal(12, 60, 8), normal(13, 60, 3).abs()
    hard = errors + 10 * normal(14, 60, 1).abs()
    assert torch.allclose(regress_errors(x, errors), regress_errors(x, hard), atol=1e-5)  # float32 sums


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_inputs_give_a_finite_router(normal: Normal, tokens: int) -> None:
    router = regress_errors(normal(15, tokens, 8), normal(16, tokens, 3).abs())
    assert torch.isfinite(router).all()


def test_inputs_that_are_all_zero_give_a_finite_router(normal: Normal) -> None:
    assert torch.isfinite(regress_errors(torch.zeros(5, 8), normal(17, 5, 3).abs())).all()


def test_the_router_is_float32_whatever_comes_in(normal: Normal) -> None:
    assert regress_errors(normal(18, 20, 8).double(), normal(19, 20, 3).double()).dtype == torch.float32
