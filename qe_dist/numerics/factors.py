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


def rank_within(bits: float, outputs: int, inputs: int, factor_bits: int, copies: int = 1) -> int:
    """The largest rank at which `copies` pairs [outputs, R] and [R, inputs] take at most so many bits."""
    scale_bits = 16 if factor_bits == 8 else 0
    spare = bits - copies * outputs * scale_bits
    return max(0, int(spare / (copies * (factor_bits * (outputs + inputs) + scale_bits))))
