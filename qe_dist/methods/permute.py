"""SERQ's offline permutation: salient channels come first where other linears of the block can absorb the order.

The input of a group may be made channel by channel from outputs of other linears, its producers (of down: gate and
up). Its channels may then have any order: the columns of the group take it, and the rows of the producers. The block
stays the same function, and a kernel finds its salient channels in one piece. Rows are quantized one by one, so what
is permuted is the finished block.

The engine does not call it: with tensor parallelism, all salient channels of down would be those of the first rank.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.quantized import Factor, GroupInput, QuantizedGroup, QuantizedLinear
from qe_dist.core.spec import BlockSpec, InputGroup
from qe_dist.numerics.factors import store_factor

Groups = Mapping[str, QuantizedGroup]


def salient_first(groups: Groups, block: BlockSpec) -> Groups:
    """The same block; salient channels are 0, 1, 2 ... wherever producers absorb the order, elsewhere as they were."""
    for group in block.groups:
        salient = groups[group.name].input.salient_channels
        if salient is not None and group.producers:
            others = torch.ones(group.in_features, dtype=torch.bool, device=salient.device)
            others[salient.long()] = False
            groups = permuted(groups, block, group, torch.cat([salient.long(), others.nonzero().squeeze(1)]))
    return groups


def permuted(groups: Groups, block: BlockSpec, group: InputGroup, order: Int[Tensor, " I"]) -> Groups:
    """The same block; channel j of the group's input is what was channel order[j]."""
    _refuse_what_would_break(groups[group.name], block, group)
    changed = {}
    for other in block.groups:
        part, linears = groups[other.name].input, dict(groups[other.name].linears)
        if other.name == group.name:
            part = _input_in_order(part, order)
            linears = {n: replace(x, codes=x.codes[:, order]) for n, x in linears.items()}
        if other.router_input == group.name and part.router is not None:
            part = replace(part, router=part.router[:, order])
        linears |= {n: _outputs_in_order(linears[n], order) for n in group.producers if n in linears}
        changed[other.name] = replace(groups[other.name], input=part, linears=linears)
    return changed


def _refuse_what_would_break(fitted: QuantizedGroup, block: BlockSpec, group: InputGroup) -> None:
    if fitted.scheme.group_size is not None:
        raise ConfigError(
            f"{group.name}: scheme {fitted.scheme} has a scale for every {fitted.scheme.group_size} input channels, "
            "which a permutation would mix; use one scale per output, such as w4a4, or leave the channels in place"
        )
    biased = [x.name for g in block.groups for x in g.linears if x.name in group.producers and x.bias]
    if biased or not group.producers:
        reason = f"{biased[0]} has a bias, which stays in its order" if biased else "no linear produces its channels"
        raise ConfigError(f"{group.name}: its channels cannot be permuted: {reason}; leave the channels in place")


def _input_in_order(part: GroupInput, order: Tensor) -> GroupInput:
    place = order.argsort()  # of each old channel

    def moved(channels: Tensor | None) -> Tensor | None:
        return None if channels is None else place[channels.long()].to(channels.dtype)

    return replace(
        part,
        input_scale=None if part.input_scale is None else part.input_scale[:, order],
        shared_down=_columns(part.shared_down, order),
        expert_down=_columns(part.expert_down, order),
        shared_channels=moved(part.shared_channels),
        expert_channels=moved(part.expert_channels),
        salient_channels=moved(part.salient_channels),
    )


def _outputs_in_order(linear: QuantizedLinear, order: Tensor) -> QuantizedLinear:
    def rows(t: Tensor | None, dim: int = 0) -> Tensor | None:
        return None if t is None else t.index_select(dim, order)

    def factor_rows(f: Factor | None) -> Factor | None:
        return None if f is None else Factor(f.values.index_select(-2, order), rows(f.scale, -1))

    return QuantizedLinear(
        codes=linear.codes[order],
        scale=linear.scale[order],
        bias=rows(linear.bias),
        shared_up=factor_rows(linear.shared_up),
        shared_columns=rows(linear.shared_columns),
        expert_up=factor_rows(linear.expert_up),
        expert_columns=rows(linear.expert_columns, 1),
        salient_columns=factor_rows(linear.salient_columns),
    )


def _columns(factor: Factor | None, order: Tensor) -> Factor | None:
    """Storing a stored factor again changes nothing: the largest of each row is the top code."""
    if factor is None:
        return None
    bits = {torch.uint8: 4, torch.int8: 8}.get(factor.values.dtype, 16)
    return store_factor(factor.dense[..., order], bits)
