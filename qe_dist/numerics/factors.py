"""Storage of low-rank factors: bf16, or int8 with one scale per row."""

import torch
from jaxtyping import Float
from torch import Tensor

from qe_dist.core.quantized import Factor


def store_factor(matrix: Float[Tensor, "*rows columns"], bits: int) -> Factor:
    """16: bf16. 8: int8 with a bf16 scale per row, max|row| / 127."""
    if bits == 16:
        return Factor(matrix.to(torch.bfloat16))
    scale = (matrix.abs().amax(dim=-1) / 127).to(torch.bfloat16)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = torch.round(matrix / scale.to(matrix.dtype)[..., None])
    return Factor(codes.clamp(-127, 127).to(torch.int8), scale)
