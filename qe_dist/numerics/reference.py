"""The formula of DESIGN section 1 in plain torch: what every kernel must compute.

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
    """Everything about x that the linears of a group share."""

    base: Float[Tensor, "T I"]
    """Qa(x~), extracted channels zero."""
    shared: Float[Tensor, "T R"] | None
    shared_channels: Float[Tensor, "T C"] | None
    experts: Float[Tensor, "T ER"] | None
    """x~ A of all experts side by side, zero but for the token's own."""
    expert_channels: Float[Tensor, "T EC"] | None
    salient: Float[Tensor, "T S"] | None


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
    if part.shared_down is not None:
        shared = x @ part.shared_down.dense.T
    if part.shared_channels is not None:
        shared_channels = _pick(x, part.shared_channels.long())
        base = _without(base, part.shared_channels.long().expand(len(x), -1))
    if expert is not None:
        own = (expert[:, None] == torch.arange(part.num_experts, device=expert.device)).to(x)
        if part.expert_down is not None:
            down = part.expert_down.dense
            experts = _keep_own(x @ down.flatten(0, 1).T, own)
        if part.expert_channels is not None:
            channels = part.expert_channels.long()
            expert_channels = _keep_own(_pick(x, channels.flatten()), own)
            base = torch.where(expert[:, None] < 0, base, _without(base, channels[expert]))
    base = round_activations(base, scheme)
    salient = None if part.salient_channels is None else _pick(base, part.salient_channels.long())
    return PreparedInput(base, shared, shared_channels, experts, expert_channels, salient)


def _pick(x: Tensor, channels: Tensor) -> Tensor:
    """Channels of every token; zero for those of other ranks."""
    return pad(x, (0, 1))[:, channels]


def _without(x: Tensor, channels: Tensor) -> Tensor:
    """Every token with its channels [T, C] zero."""
    return pad(x, (0, 1)).scatter(1, channels, 0.0)[:, :-1]


def _keep_own(z: Tensor, own: Tensor) -> Tensor:
    """[T, E*R], one-hot or zero [T, E] -> the same with the other experts' columns zero."""
    tokens, experts = own.shape
    return (z.view(tokens, experts, -1) * own[..., None]).flatten(1)


def linear_forward(
    linear: QuantizedLinear, x: PreparedInput, weight: Float[Tensor, "O I"] | None = None
) -> Float[Tensor, "T O"]:
    """float32, whatever the precision of the input. weight: the linear's codes times its scale, where they are kept."""
    y = x.base @ (dequantize(linear.codes, linear.scale) if weight is None else weight).T
    if linear.shared_up is not None:
        y = y + x.shared @ linear.shared_up.dense.T
    if linear.shared_columns is not None:
        y = y + x.shared_channels @ linear.shared_columns.float().T
    if linear.expert_up is not None:
        y = y + x.experts @ linear.expert_up.dense.transpose(1, 2).flatten(0, 1)
    if linear.expert_columns is not None:
        y = y + x.expert_channels @ linear.expert_columns.float().transpose(1, 2).flatten(0, 1)
    if linear.salient_columns is not None:
        y = y + x.salient @ linear.salient_columns.dense.T
    if linear.bias is not None:
        y = y + linear.bias.float()
    return y
