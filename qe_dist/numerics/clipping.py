"""Clipping: a smaller scale cuts off the largest weights of a row and rounds all the others more finely.

Factors go from half of RTN's scale, as in AWQ's search (arXiv 2306.00978; methods.md section 6), up to the
one with which the largest weight fits even where it is positive: there the grid is half a step too short.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qe_dist.core.errors import NumericalError
from qe_dist.numerics.grid import dequantize, round_to_grid, weight_scale

ROWS = 2048
"""Rows of a weight that are searched at a time, which bounds the memory."""


def clip_factors(bits: int, count: int) -> list[float]:
    """Multiples of RTN's scale that a search tries; the first is 1."""
    fits = (2**bits - 1) / (2**bits - 2)
    return [1.0, *torch.linspace(0.5, fits, count - 1, dtype=torch.float64).tolist()]


def scaled(scale: Float[Tensor, "O G"], factor: float) -> Float[Tensor, "O G"]:
    """The scale times the factor, in bf16. A scale that would become zero stays as it is."""
    product = (scale.double() * factor).to(torch.bfloat16)
    return torch.where(product > 0, product, scale.to(torch.bfloat16))


def clipped_scale(
    weight: Float[Tensor, "O I"],
    bits: int,
    group_size: int | None,
    gram: Float[Tensor, "I I"] | None = None,
    factors: Sequence[float] | None = None,
) -> Float[Tensor, "O G"]:
    """For each row and group g the multiple of its scale for which rounding leaves the least e G_gg e^T.

    G_gg is the Gram matrix of the group's own columns; without it, the least e e^T. The first of equal ones is taken.
    A factor costs 2 O I g FLOP: little for groups of 128, but with one scale per row (g = I) twice what it costs GPTQ.
    """
    factors = clip_factors(bits, 24) if factors is None else factors
    scale = weight_scale(weight, bits, group_size)
    size = weight.shape[1] // scale.shape[1]
    peak = 1.0 if gram is None else float(torch.linalg.vector_norm(gram, torch.inf))  # else costs could overflow
    if not math.isfinite(peak):
        raise NumericalError("the Gram matrix has a NaN or Inf")
    for g in range(scale.shape[1]):
        own = slice(g * size, (g + 1) * size)
        metric = None if gram is None else (gram[own, own] / (peak or 1.0)).to(weight.dtype)
        for part, found in zip(weight[:, own].split(ROWS), scale[:, g, None].split(ROWS), strict=True):
            found.copy_(_least(part, found, bits, metric, factors))
    return scale


def _least(
    weight: Float[Tensor, "O I"],
    scale: Float[Tensor, "O 1"],
    bits: int,
    metric: Float[Tensor, "I I"] | None,
    factors: Sequence[float],
) -> Float[Tensor, "O 1"]:
    least, best = torch.full_like(weight[:, :1], torch.inf), scale
    for factor in factors:
        tried = scaled(scale, factor)
        error = weight - dequantize(round_to_grid(weight, tried, bits), tried, weight.dtype)
        cost = ((error if metric is None else error @ metric) * error).sum(dim=1, keepdim=True)
        best = torch.where(cost < least, tried, best)
        least = torch.minimum(cost, least)
    if not torch.isfinite(least).all():
        raise NumericalError("the error of rounding is a NaN or Inf")
    return best
