"""Refinement never makes things worse on its tokens, and finds back to an optimum that was disturbed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qe_dist.numerics.refine import Refinement, refine

Parts = tuple[Tensor, Tensor, Tensor]
TOKENS, INPUTS, OUTPUTS, RANK, EXPERTS = 240, 16, 12, 2, 3


def left_over(x: Tensor, target: Tensor, parts: Parts) -> float:
    """Squared error of top-1 routing, one token at a time in float64."""
    up, down, router = (part.double() for part in parts)
    total = 0.0
    for token, wanted in zip(x.double(), target.double(), strict=True):
        expert = int((router @ token.abs()).argmin())
        total += float((wanted - up[expert] @ (down[expert] @ token)).square().sum())
    return total


@pytest.fixture
def optimum(normal: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Parts]:
    """(tokens, what the experts should give, parts that give exactly that).

    Tokens are of three kinds, each with its own loud channels, which the router of their expert likes.
    """
    kind = torch.arange(TOKENS) % EXPERTS
    loud = torch.nn.functional.one_hot(torch.arange(INPUTS) % EXPERTS, EXPERTS).T.float()
    x = normal(0, TOKENS, INPUTS) * (0.1 + loud[kind])
    up, down = normal(1, EXPERTS, OUTPUTS, RANK), normal(2, EXPERTS, RANK, INPUTS)
    target = torch.einsum("tor,tri,ti->to", up[kind], down[kind], x)
    return x, target, (up, down, 1 - loud)


@pytest.fixture
def disturbed(optimum: tuple[Tensor, Tensor, Parts], normal: Callable[..., Tensor]) -> Parts:
    up, down, router = optimum[2]
    return up + 0.5 * normal(3, *up.shape), down + 0.5 * normal(4, *down.shape), router


SHORT = Refinement(epochs=1, iterations=150, lr=3e-3, batch=120)


def test_a_disturbed_optimum_is_improved(optimum: tuple[Tensor, Tensor, Parts], disturbed: Parts) -> None:
    """Not all the way: in training the experts are mixed, so the best mixture is approached."""
    x, target, _ = optimum
    end = refine(x, x, target, disturbed, SHORT)
    assert left_over(x, target, end) < 0.6 * left_over(x, target, disturbed)


@pytest.mark.parametrize("lr", [1e-3, 0.1, 10.0])
def test_it_is_never_worse_on_its_tokens(
    optimum: tuple[Tensor, Tensor, Parts], normal: Callable[..., Tensor], lr: float
) -> None:
    """Whatever the learning rate does: the start is kept then."""
    x, target, best = optimum
    near = (best[0] + 0.01 * normal(5, *best[0].shape), *best[1:])
    end = refine(x, x, target, near, Refinement(epochs=1, iterations=10, lr=lr))
    assert left_over(x, target, end) <= left_over(x, target, near) * (1 + 1e-5)


def test_the_optimum_itself_is_returned_as_it_is(
    optimum: tuple[Tensor, Tensor, Parts], same: Callable[[Any, Any], bool]
) -> None:
    x, _, best = optimum
    target = torch.zeros(TOKENS, OUTPUTS)
    silent = (torch.zeros_like(best[0]), *best[1:])
    assert same(refine(x, x, target, silent, Refinement(epochs=1, iterations=3)), silent)


def test_the_router_may_read_another_tensor(optimum: tuple[Tensor, Tensor, Parts], disturbed: Parts) -> None:
    """Here one channel per kind of token."""
    x, target, _ = optimum
    router_x = torch.nn.functional.one_hot(torch.arange(TOKENS) % EXPERTS, EXPERTS).float()
    start = (*disturbed[:2], 1 - torch.eye(EXPERTS))
    up, down, router = refine(x, router_x, target, start, SHORT)
    assert (up.shape, down.shape, router.shape) == (start[0].shape, start[1].shape, (EXPERTS, EXPERTS))


def test_it_is_repeatable_and_leaves_its_start_alone(
    optimum: tuple[Tensor, Tensor, Parts], disturbed: Parts, same: Callable[[Any, Any], bool]
) -> None:
    x, target, _ = optimum
    before = tuple(part.clone() for part in disturbed)
    first = refine(x, x, target, disturbed, SHORT)
    torch.manual_seed(99)  # the global state has no say
    assert same(refine(x, x, target, disturbed, SHORT), first)
    assert same(disturbed, before)


def test_the_seed_decides_which_tokens_are_drawn(
    optimum: tuple[Tensor, Tensor, Parts], disturbed: Parts, same: Callable[[Any, Any], bool]
) -> None:
    x, target, _ = optimum
    few = {"epochs": 1, "iterations": 20, "lr": 3e-3, "batch": 30}
    one, other = (refine(x, x, target, disturbed, Refinement(seed=seed, **few)) for seed in (0, 1))
    assert not same(one, other)


def test_the_result_asks_for_no_gradient(optimum: tuple[Tensor, Tensor, Parts], disturbed: Parts) -> None:
    x, target, _ = optimum
    with torch.no_grad():  # as a fit runs
        end = refine(x, x, target, disturbed, SHORT)
    assert not any(part.requires_grad for part in end)


@pytest.mark.parametrize("tokens", [1, 2])
def test_few_tokens_are_enough(optimum: tuple[Tensor, Tensor, Parts], disturbed: Parts, tokens: int) -> None:
    x, target, _ = optimum
    end = refine(x[:tokens], x[:tokens], target[:tokens], disturbed, Refinement(epochs=1, iterations=5))
    assert all(torch.isfinite(part).all() for part in end)
