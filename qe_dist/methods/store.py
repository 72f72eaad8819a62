"""From what a method found to what is stored: the one place where factors and columns are rounded."""

from collections.abc import Mapping
from dataclasses import replace

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
    shared, experts, salient = c.shared, c.experts, c.salient
    if experts is not None and c.extracted is not None:  # the columns for every token are all of W there
        experts = replace(experts, down=experts.down.index_fill(2, c.extracted, 0.0))
    part = GroupInput(
        input_scale=_bf16(moved.input_scale),
        shared_down=_stored(shared.down, bits) if shared else None,
        shared_channels=_int32(c.extracted),
        expert_down=_stored(experts.down, bits) if experts else None,
        expert_channels=_int32(experts.channels) if experts else None,
        router=_bf16(experts.router) if experts else None,
        salient_channels=_int32(salient.channels) if salient else None,
        rotation=moved.rotation,
    )
    linears, start = {}, 0
    for name, weight in moved.weights.items():
        rows = slice(start, start + len(weight))
        linears[name], start = _linear(weight, codes[name], c.of_rows(rows), part, bits), rows.stop
    return QuantizedGroup(moved.scheme, part, linears)


def _linear(weight: Tensor, codes: Codes, c: Correction, part: GroupInput, bits: int) -> QuantizedLinear:
    """c: the rows of this linear. part: what its group stores, the down matrices among it."""
    shared_up = _stored(c.shared.up, bits) if c.shared else None
    expert_up = _stored(c.experts.up, bits) if c.experts else None
    shared, own = _pair(shared_up, part.shared_down), _pair(expert_up, part.expert_down)
    channels = c.experts.channels if c.experts else None
    return QuantizedLinear(
        codes=codes.codes,
        scale=codes.scale,
        shared_up=shared_up,
        shared_columns=None if c.extracted is None else _columns(weight, c.extracted, shared),
        expert_up=expert_up,
        expert_columns=None if channels is None else _expert_columns(weight, channels, shared, own),
        salient_columns=_stored(c.salient.columns, bits) if c.salient else None,
    )


def _stored(matrix: Tensor, bits: int) -> Factor | None:
    """None for a rank of zero, which a small byte budget may give."""
    return None if matrix.numel() == 0 else store_factor(matrix, bits)


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


def _bf16(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.bfloat16)


def _int32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.int32)
