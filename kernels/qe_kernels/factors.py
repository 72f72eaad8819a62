"""Factors of low-rank branches: as in the checkpoint, and with ranks that the kernels copy by 16 bytes.

A checkpoint has any rank. At load ranks are filled up with zeros, once: rows of A, columns of B, and channels that no
rank has in lists.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

Factor = tuple[Tensor, Tensor | None]
"""Values [*rows, columns] in bf16 or fp16, without scale; or int8, or uint8 [*rows, columns/2] with two codes + 8 to a
byte (the even column in the lower half), and their scale [*rows]."""
CHUNK = 128
"""Columns of a branch that a step of the linear takes at most, and of which it takes whole numbers."""


def dense(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The matrix [*rows, columns] that a factor stands for."""
    if values.dtype == torch.uint8:
        values = torch.stack((values & 15, values >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
    return values.to(dtype) if scale is None else values.to(dtype) * scale.to(dtype)[..., None]


def padded_rank(rank: int) -> int:
    """The least that the linear takes of an expert, or of a branch without: 32, 64, or a multiple of 128."""
    return next((size for size in (32, 64) if size >= rank), padded_columns(rank))


def padded_columns(columns: int) -> int:
    """The columns of all experts of a branch side by side, filled up to whole chunks."""
    return -(-columns // CHUNK) * CHUNK


def padded_down(factor: Factor) -> Factor:
    """A [.., R, K] with rows of zeros."""
    values, scale = factor
    more = padded_rank(values.shape[-2]) - values.shape[-2]
    if not more:
        return factor
    zero = 0x88 if values.dtype == torch.uint8 else 0
    return pad(values, (0, 0, 0, more), value=zero), None if scale is None else pad(scale, (0, more))


def padded_up(factor: Factor) -> Factor:
    """B [.., N, R] with columns of zeros."""
    values, scale = factor
    packed, zero = (2, 0x88) if values.dtype == torch.uint8 else (1, 0)
    more = padded_rank(packed * values.shape[-1]) // packed - values.shape[-1]
    return pad(values, (0, more), value=zero), scale


def padded_channels(channels: Tensor, columns: int) -> Tensor:
    """Lists of channels [.., C], filled up with `columns`, a channel that is nobody's and whose value is zero."""
    return pad(channels, (0, padded_rank(channels.shape[-1]) - channels.shape[-1]), value=columns)
