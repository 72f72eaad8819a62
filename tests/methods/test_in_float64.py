"""Recipes of others from the raw input on, as their authors write them, in float64: the same error within 0.1 %.

SERQ, MASQuant, ASER and the low-rank family have theirs beside their other tests. Scales, and steps of weights, are in
the bf16 in which they are stored.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qe_dist.methods.base import GroupProblem
from qe_dist.methods.recipes import load_recipe

WIDTH, TOKENS = 96, 500


@pytest.fixture(scope="module")
def x(planted: Callable[..., Any]) -> Tensor:
    return planted(TOKENS, WIDTH).x


def stored(t: Tensor) -> Tensor:
    return t.bfloat16().double()


def steps_of(weight: Tensor, size: int) -> Tensor:
    """One for every weight: max|w| of its group over half of the grid of 4 bits."""
    groups = weight.unflatten(1, (-1, size))
    return stored(groups.abs().amax(dim=2, keepdim=True) / 7.5).expand_as(groups).flatten(1)


def nearest(weight: Tensor, step: Tensor) -> Tensor:
    return torch.round(weight / step).clamp(-8, 7) * step


def rtn(weight: Tensor, size: int, tokens: Tensor) -> Tensor:
    return nearest(weight, steps_of(weight, size))


def gptq(weight: Tensor, size: int, tokens: Tensor) -> Tensor:
    """H = X^T X with a hundredth of its mean diagonal added, the loudest channel first, H^-1 = U^T U."""
    gram = tokens.T @ tokens
    order = gram.diagonal().argsort(descending=True)
    w, step = weight[:, order].clone(), steps_of(weight, size)[:, order]
    hessian = gram[order][:, order] + 0.01 * gram.diagonal().mean() * torch.eye(WIDTH).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    rounded = torch.zeros_like(w)
    for i in range(WIDTH):
        rounded[:, i] = nearest(w[:, i], step[:, i])
        w[:, i:] -= ((w[:, i] - rounded[:, i]) / upper[i, i])[:, None] * upper[i, i:]
    return rounded[:, order.argsort()]


def grid_of_tokens(tokens: Tensor, bits: int) -> Tensor:
    step = tokens.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.round(tokens / step) * step


def smoothquant(x: Tensor, weight: Tensor, output: Callable[[Tensor], Tensor]) -> Tensor:
    """s = max|x|^0.5 / max|W|^0.5."""
    return stored((x.abs().amax(dim=0) / weight.abs().amax(dim=0)).sqrt())


def awq(x: Tensor, weight: Tensor, output: Callable[[Tensor], Tensor]) -> Tensor:
    """s = mean|x|^a over sqrt(max s min s), the a of 20 with the least square error."""
    powers = [x.abs().mean(dim=0) ** (i / 20) for i in range(20)]
    scales = [stored(s / (s.max() * s.min()).sqrt()) for s in powers]
    return min(scales, key=lambda s: float((output(s) - x @ weight.T).square().sum()))


def unscaled(x: Tensor, weight: Tensor, output: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.ones(WIDTH).double()


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int, int | None]] = {
    "rtn-w4a8": (unscaled, rtn, WIDTH, 8),
    "gptq-w4a6": (unscaled, gptq, WIDTH, 6),
    "smoothquant-w4a6": (smoothquant, rtn, WIDTH, 6),
    "smoothquant+gptq-w4a8": (smoothquant, gptq, WIDTH, 8),
    "smoothquant+gptq-w4a6": (smoothquant, gptq, WIDTH, 6),
    "awq-w4a16g32": (awq, rtn, 32, None),
    "awq+gptq-w4a16g32": (awq, gptq, 32, None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_error_is_that_of_the_authors_formulas(name: str, x: Tensor, problem_for: Callable[..., Any]) -> None:
    scale_of, quantizer, size, act_bits = CASES[name]
    recipe = load_recipe(name)
    problem: GroupProblem = problem_for(recipe, x)
    tokens = x.double()
    weight = torch.cat(list(problem.weights.values())).double()

    def output(scale: Tensor, rounding: Callable[..., Tensor] = rtn) -> Tensor:
        moved = tokens / scale
        rounded = moved if act_bits is None else grid_of_tokens(moved, act_bits)
        return rounded @ rounding(weight * scale, size, moved).T

    exact = tokens @ weight.T
    wanted = float((output(scale_of(tokens, weight, output), quantizer) - exact).norm() / exact.norm())
    assert recipe.fit(problem).report.error == pytest.approx(wanted, rel=1e-3)
