"""From what a method found to what is stored: the one place where factors and columns are rounded."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qe_dist.core.quantized import Factor, GroupInput, QuantizedGroup, QuantizedLinear
from qe_dist.methods.base import Codes, Correction, GroupProblem
from qe_dist.numerics.factors import store_factor


def stored(moved: GroupProblem, codes: Mapping[str, Codes], c: Correction, bits: int) -> QuantizedGroup:
    """Rounds the factors to their stored form, then takes the columns of extracted channels, which make up
    for whatever those factors contribute there: extraction is exact up to bf16.

    bits: of the factors.
    """
    c = c.with_even_ranks() if bits == 4 else c
    expert_down = c.expert_down
    if expert_down is not None and c.shared_channels is not None:  # the shared columns are all of W there
        expert_down = expert_down.index_fill(2, c.shared_channels, 0.0)
    shared_down, expert_down = _stored(c.shared_down, bits), _stored(expert_down, bits)
    sizes = [w.shape[0] for w in moved.weights.values()]
    ups = zip(_rows(c.shared_up, sizes, 0), _rows(c.expert_up, sizes, 1), strict=True)
    salient = dict(zip(moved.weights, _rows(c.salient_columns, sizes, 0), strict=True))
    linears = {}
    for (name, weight), (shared_rows, expert_rows) in zip(moved.weights.items(), ups, strict=True):
        shared_up, expert_up = _stored(shared_rows, bits), _stored(expert_rows, bits)
        shared, own = _pair(shared_up, shared_down), _pair(expert_up, expert_down)
        linears[name] = QuantizedLinear(
            codes=codes[name].codes,
            scale=codes[name].scale,
            shared_up=shared_up,
            shared_columns=None if c.shared_channels is None else _columns(weight, c.shared_channels, shared),
            expert_up=expert_up,
            expert_columns=None
            if c.expert_channels is None
            else _expert_columns(weight, c.expert_channels, shared, own),
            salient_columns=_stored(salient[name], bits),
        )
    part = GroupInput(
        input_scale=_bf16(moved.input_scale),
        shared_down=shared_down,
        shared_channels=_int32(c.shared_channels),
        expert_down=expert_down,
        expert_channels=_int32(c.expert_channels),
        router=_bf16(c.router),
        salient_channels=_int32(c.salient_channels),
        rotation=moved.rotation,
    )
    return QuantizedGroup(moved.scheme, part, linears)


def _stored(matrix: Tensor | None, bits: int) -> Factor | None:
    """None for a rank of zero too, which a small byte budget may give."""
    return None if matrix is None or matrix.numel() == 0 else store_factor(matrix, bits)


Pairs = list[tuple[Tensor, Tensor]]


def _pair(up: Factor | None, down: Factor | None) -> Pairs:
    """(up, down) as matrices, or nothing."""
    return [] if up is None or down is None else [(up.dense, down.dense)]


def _columns(weight: Tensor, channels: Tensor, pairs: Pairs) -> Tensor:
    """What an extracted channel is multiplied with: its column, less what low-rank pairs add there. [O, C]"""
    columns = weight[:, channels]
    for up, down in pairs:
        columns = columns - up @ down[:, channels]
    return columns.to(torch.bfloat16)


def _expert_columns(weight: Tensor, channels: Tensor, shared: Pairs, own: Pairs) -> Tensor:
    """[E, O, C]"""
    own_of = [[(up[e], down[e]) for up, down in own] for e in range(len(channels))]
    return torch.stack([_columns(weight, channels[e], shared + own_of[e]) for e in range(len(channels))])


def _rows(stacked: Tensor | None, sizes: list[int], dim: int) -> tuple[Tensor | None, ...]:
    return (None,) * len(sizes) if stacked is None else stacked.split(sizes, dim=dim)


def _bf16(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.bfloat16)


def _int32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.int32)
