"""The rotation of a group's input at run time, in front of `quantize`: x (H, H, ...), H = F_1 ⊗ F_2 ⊗ ... .

A fast Hadamard transform whose steps are matrix products with the factors, on any device by torch: no kernel of its own
yet. Each step reads and writes x once, in float32; a Triton kernel would do all of them, and the rounding of the
activations behind them, in one pass.
"""

import math
from collections.abc import Sequence

from torch import Tensor


def rotate(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """x [M, K] (bf16, fp16 or float32) times H, block by block, in the dtype of x: computed in float32, rounded once.

    factors: orthogonal matrices in float32; the product of their sizes divides K.
    """
    y = x.float().unflatten(1, (-1, math.prod(len(factor) for factor in factors)))
    for factor in factors:  # the first digit of the index goes to the end: after all they stand as before
        y = (y.unflatten(-1, (len(factor), -1)).transpose(-1, -2) @ factor).flatten(-2)
    return y.flatten(1).to(x.dtype)
