"""Scales of groups of weights: how a kernel loads and applies them, and the same in torch."""

import torch
from torch import Tensor

from qe_kernels.layout import Weight
from qe_kernels.triton_if_any import tl, triton


def scaled(codes: Tensor, scale: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """codes [N, K], scale [N, G] -> weights [N, K]."""
    size = weight.group_size or weight.columns
    return codes.to(dtype) * scale.to(dtype).repeat_interleave(size, dim=1)[:, : weight.columns]


@triton.jit
def load_scales(scale, rows, k, N, K, GROUP: tl.constexpr, SPAN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK / SPAN]: the scales of each SPAN of the columns k .. k + BK - 1; a span lies within a group.

    Spans that share a group are worth it where a thread then loads 4 bytes, the least that is copied asynchronously.
    """
    columns = k + SPAN * tl.arange(0, BK // SPAN)
    mask = (rows < N)[:, None]
    if BK > SPAN:
        mask = mask & (columns < K)[None, :]
    return tl.load(scale + (columns // GROUP).to(tl.int64)[None, :] * N + rows[:, None], mask=mask, other=0)


@triton.jit
def scale_weights(w, scales):
    """w [BN, BK] by scales [BN, groups]."""
    BN: tl.constexpr = w.shape[0]
    GROUPS: tl.constexpr = scales.shape[1]
    grouped = w.reshape(BN, GROUPS, w.shape[1] // GROUPS)
    return (grouped * scales.to(w.dtype)[:, :, None]).reshape(BN, w.shape[1])
