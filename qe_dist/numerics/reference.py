"""The formula of a quantized linear in plain torch: what every kernel must compute.

y = Qa(x~ without extracted channels) W^T + (x~ A_s) B_s + (x~ A_e) B_e + x~[extracted] columns
    + Qa(x~)[salient] salient_columns

Under tensor parallelism x holds a slice of the channels; the index I stands for a channel of another rank.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor
from torch.nn.functional import pad

from qe_dist.core.quantized import GroupInput, QuantizedLinear
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.grid import dequantize, round_activations
from qe_dist.numerics.hadamard import rotate_blocks, unit
from qe_dist.numerics.routing import choose_experts


@dataclass(frozen=True)
class PreparedInput:
    """What the linears of a group read, made once from their input x."""

    base: Float[Tensor, "T I"]
    """Qa(x~), extracted channels zero."""
    shared: Float[Tensor, "T R"] | None
    shared_channels: Float[Tensor, "T C"] | None
    experts: Float[Tensor, "T R"] | None
    """x~ A of the token's own expert; zero for tokens without an expert."""
    expert_channels: Float[Tensor, "T D"] | None
    """Channels that the token's own expert extracts; zero for tokens without an expert."""
    salient: Float[Tensor, "T S"] | None
    members: tuple[Int[Tensor, " _"], ...] = ()
    """Indices of the tokens of each expert."""


def route(
    part: GroupInput, router_x: Float[Tensor, "T H"] | None, modality: Int8[Tensor, " T"] | None = None
) -> Int[Tensor, " T"] | None:
    """The expert of every token, -1 for none; None where there are no experts."""
    if part.router is not None:
        assert router_x is not None, "a group with a router needs the router's input"
        return choose_experts(router_x, part.router)
    if part.num_experts:
        assert modality is not None, "experts without a router need the tokens' modality"
        return modality.long() - 1
    return None


def prepare(
    part: GroupInput,
    x: Float[Tensor, "T I"],
    expert: Int[Tensor, " T"] | None,
    scheme: Scheme,
    modality: Int8[Tensor, " T"] | None = None,
) -> PreparedInput:
    """What the linears of a group read of their input x. expert: of every token, -1 for none. modality: needed where
    scales follow it."""
    x = rotate_blocks(x.float(), unit(part.rotation, torch.float32))
    if part.input_scale is not None:
        scale = part.input_scale.float()
        if scale.shape[0] == 1:
            x = x / scale
        else:
            assert modality is not None, "scales by modality need the tokens' modality"
            x = x / scale[modality.long()]
    base = x
    shared = shared_channels = experts = expert_channels = None
    members: tuple[Tensor, ...] = ()
    if part.shared_down is not None:
        shared = x @ part.shared_down.dense.T
    if part.shared_channels is not None:
        shared_channels = _pick(x, part.shared_channels.long())
        base = _without(base, part.shared_channels.long().expand(len(x), -1))
    if expert is not None:
        members = tuple((expert == e).nonzero().squeeze(1) for e in range(part.num_experts))
        if part.expert_down is not None:
            down = part.expert_down.dense
            experts = _add_own(x.new_zeros(len(x), down.shape[1]), x, down, members)
        if part.expert_channels is not None:
            channels = part.expert_channels.long()[expert]
            of_none = expert[:, None] < 0
            expert_channels = pad(x, (0, 1)).gather(1, channels).masked_fill(of_none, 0.0)
            base = torch.where(of_none, base, _without(base, channels))
    base = round_activations(base, scheme)
    salient = salient_of(base, part)
    return PreparedInput(base, shared, shared_channels, experts, expert_channels, salient, members)


def salient_of(base: Float[Tensor, "T I"], part: GroupInput) -> Float[Tensor, "T S"] | None:
    """The salient channels of the rounded input; None where there are none."""
    return None if part.salient_channels is None else _pick(base, part.salient_channels.long())


def _pick(x: Tensor, channels: Tensor) -> Tensor:
    """These channels of every token; zero for channels that another rank holds (index = width)."""
    return pad(x, (0, 1))[:, channels]


def _without(x: Tensor, channels: Tensor) -> Tensor:
    """x with the channels of each token [T, C] set to zero."""
    return pad(x, (0, 1)).scatter(1, channels, 0.0)[:, :-1]


def _add_own(y: Tensor, x: Tensor, matrices: Tensor, members: tuple[Tensor, ...]) -> Tensor:
    """Adds to y [T, O] each token of x [T, I] times the matrix [O, I] of its own expert, in place."""
    for matrix, own in zip(matrices, members, strict=True):
        y.index_add_(0, own, x[own] @ matrix.T)
    return y


def _made(part: Tensor | None) -> Tensor:
    assert part is not None, "the linear reads what its group did not prepare"
    return part


def linear_forward(
    linear: QuantizedLinear, x: PreparedInput, weight: Float[Tensor, "O I"] | None = None
) -> Float[Tensor, "T O"]:
    """Outputs of a quantized linear, in float32. weight: its dequantized codes, where the caller keeps them."""
    y = x.base @ (dequantize(linear.codes, linear.scale) if weight is None else weight).T
    if linear.shared_up is not None:
        y.addmm_(_made(x.shared), linear.shared_up.dense.T)
    if linear.shared_columns is not None:
        y.addmm_(_made(x.shared_channels), linear.shared_columns.float().T)
    if linear.expert_up is not None:
        _add_own(y, _made(x.experts), linear.expert_up.dense, x.members)
    if linear.expert_columns is not None:
        _add_own(y, _made(x.expert_channels), linear.expert_columns.float(), x.members)
    if linear.salient_columns is not None:
        y.addmm_(_made(x.salient), linear.salient_columns.dense.T)
    if linear.bias is not None:
        y += linear.bias.float()
    return y
