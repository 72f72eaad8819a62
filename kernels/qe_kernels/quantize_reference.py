"""`quantize` in plain torch, of any float dtype and width."""

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from qe_kernels.quantize import Activations


def quantize_reference(
    x: Tensor,
    *,
    bits: int | None,
    outliers: int = 0,
    int8: bool,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
    input_scale: Tensor | None = None,
    modality: Tensor | None = None,
    shared_channels: Tensor | None = None,
    expert_channels: Tensor | None = None,
    expert: Tensor | None = None,
    extracted: Tensor | None = None,
    salient_channels: Tensor | None = None,
    with_x: bool = True,
) -> Activations:
    """`quantize` in torch, of any float dtype and width; fp64 is computed in fp64."""
    prepared = base = _prepared_reference(x, norm_weight, eps, gated, input_scale, modality)
    here = pad(prepared, (0, 1))  # and zeros for channels of other ranks
    shared_z = None if shared_channels is None else here[:, shared_channels.long()]
    expert_z = token_scale = salient_z = None
    row = torch.zeros(len(x), dtype=torch.long, device=x.device)
    if expert_channels is not None:
        assert expert is not None, "expert_channels need the expert of every token"
        row = expert.long() + 1
        expert_z = here.gather(1, expert_channels.long()[expert.long().clamp_min(0)])
        expert_z = expert_z.masked_fill(expert[:, None] < 0, 0.0)
    if shared_channels is not None or expert_channels is not None:
        assert extracted is not None, "channels that are taken out need the table of them"
        base = prepared.masked_fill(extracted[row].bool(), 0.0)
    if bits is not None:
        base, token_scale = _rounded_reference(base, 2 ** (bits - 1) - 1, outliers, int8)
    if salient_channels is not None:
        salient_z = pad(base, (0, 1))[:, salient_channels.long()]
        if token_scale is not None:
            salient_z = (salient_z.to(token_scale.dtype) * token_scale[:, None]).to(prepared.dtype)
    return Activations(prepared if with_x else None, base, token_scale, shared_z, expert_z, salient_z)


def _prepared_reference(
    x: Tensor, norm_weight: Tensor | None, eps: float, gated: bool, input_scale: Tensor | None, modality: Tensor | None
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    if gated:
        gate, up = x.to(wide).chunk(2, dim=1)
        x = (silu(gate).to(x.dtype) * up).to(x.dtype)
    if norm_weight is not None:
        value = x.to(wide)
        normed = (value * torch.rsqrt(value.square().mean(dim=1, keepdim=True) + eps)).to(x.dtype)
        x = (normed * norm_weight.to(wide)).to(x.dtype)
    if input_scale is not None:
        rows = input_scale if len(input_scale) == 1 or modality is None else input_scale[modality.long()]
        x = (x / rows.to(wide)).to(x.dtype)
    return x


def _rounded_reference(x: Tensor, top: int, outliers: int, int8: bool) -> tuple[Tensor, Tensor | None]:
    """Activations.base and token_scale."""
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    reach = value.abs().topk(outliers + 1, dim=1).values[:, -1:]
    scale = (reach / top).clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.round(value / scale)
    if outliers:
        return torch.where(value.abs() <= reach, codes * scale, value).to(x.dtype), None
    return codes.to(torch.int8 if int8 else x.dtype), scale[:, 0]
