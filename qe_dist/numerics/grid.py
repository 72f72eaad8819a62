"""Rounding to symmetric integer grids.

Weights use the grid of compressed-tensors: codes -2^(b-1) .. 2^(b-1)-1, scale = max|w| / ((2^b - 1) / 2), or a signed
scale with which the largest |w| has the code -2^(b-1).
Activations use the grid of integer tensor cores: codes -q .. q with q = 2^(b-1)-1, one scale per token.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.lowrank import capped


def weight_scale(weight: Float[Tensor, "O I"], bits: int, group_size: int | None) -> Float[Tensor, "O G"]:
    """Scales of RTN, already rounded to the bf16 in which they are stored. [O, groups]"""
    grouped = _grouped(weight, group_size)
    scale = grouped.abs().amax(dim=-1) / ((2**bits - 1) / 2)
    scale = scale.to(torch.bfloat16)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def full_range_scale(weight: Float[Tensor, "O I"], bits: int, group_size: int | None) -> Float[Tensor, "O G"]:
    """Signed scales: the weight of largest magnitude has the code -2^(b-1), where the grid has one point more. In bf16,
    as stored. [O, groups]"""
    grouped = _grouped(weight, group_size)
    peak = grouped.gather(-1, grouped.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    scale = (peak / -(2 ** (bits - 1))).to(torch.bfloat16)
    return torch.where(scale != 0, scale, torch.ones_like(scale))


def round_to_grid(weight: Float[Tensor, "O I"], scale: Float[Tensor, "O G"], bits: int) -> Int8[Tensor, "O I"]:
    """The nearest code of every weight."""
    wide = _spread(scale.to(weight.dtype), weight.shape[1])
    codes = torch.round(weight / wide).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.to(torch.int8)


def dequantize(
    codes: Int8[Tensor, "O I"], scale: Float[Tensor, "O G"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "O I"]:
    """codes * scale, in `dtype`."""
    return codes.to(dtype) * _spread(scale.to(dtype), codes.shape[1])


def round_activations(x: Float[Tensor, "T I"], scheme: Scheme) -> Float[Tensor, "T I"]:
    """Qa: each token to its own symmetric grid and back; its dynamic outlier channels stay as they are, and do
    not stretch the grid. Without activation bits x is left as it is."""
    if scheme.act_bits is None:
        return x
    if scheme.dynamic_outliers is None:
        return _to_token_grid(x, scheme.act_bits)
    largest = _largest(x.abs(), capped(x.shape[1], scheme.dynamic_outliers))
    return torch.where(largest, x, _to_token_grid(x.masked_fill(largest, 0.0), scheme.act_bits))


def _largest(magnitude: Float[Tensor, "T I"], count: int) -> Bool[Tensor, "T I"]:
    """Marks the `count` largest channels of every token. On a CPU they are those above a threshold, which NumPy finds
    eight times as fast as `topk` finds the channels; where several channels are equal to it, `topk` chooses among
    them."""
    if magnitude.is_cuda:
        return torch.zeros_like(magnitude, dtype=torch.bool).scatter(1, magnitude.topk(count, dim=1).indices, True)
    position = magnitude.shape[1] - count
    threshold = torch.from_numpy(np.partition(magnitude.detach().numpy(), position, axis=1)[:, position])
    chosen = magnitude >= threshold[:, None]
    tied = (chosen.sum(dim=1) > count).nonzero().squeeze(1)
    if len(tied):
        exact = magnitude[tied].topk(count, dim=1).indices
        chosen[tied] = torch.zeros_like(chosen[tied]).scatter(1, exact, True)
    return chosen


def _to_token_grid(x: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(dim=-1, keepdim=True) / top).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.div(x, scale).round_().clamp_(-top, top).mul_(scale)


def _grouped(weight: Tensor, group_size: int | None) -> Tensor:
    rows, columns = weight.shape
    size = group_size or columns
    if columns % size:
        raise ConfigError(
            f"group size {size} does not divide the input width {columns}; "
            "choose a group size that does, or per-channel scales"
        )
    return weight.reshape(rows, columns // size, size)


def _spread(scale: Tensor, columns: int) -> Tensor:
    """[O, G] -> [O, I], or [O, 1] where one scale serves the whole row."""
    if scale.shape[1] == 1:
        return scale
    return scale.repeat_interleave(columns // scale.shape[1], dim=1)
