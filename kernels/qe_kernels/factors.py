"""Factors of low-rank branches, stored as in the checkpoint."""

import torch
from torch import Tensor

Factor = tuple[Tensor, Tensor | None]
"""Values [*rows, columns] in bf16 or fp16, without scale; or int8, or uint8 [*rows, columns/2] with two codes + 8 to a
byte (the even column in the lower half), and their scale [*rows]."""


def dense(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The matrix [*rows, columns] that a factor stands for."""
    if values.dtype == torch.uint8:
        values = torch.stack((values & 15, values >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
    return values.to(dtype) if scale is None else values.to(dtype) * scale.to(dtype)[..., None]
