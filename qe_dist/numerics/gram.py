"""X^T X in float32, by panels: the lower half is the mirror image of the upper one and costs no products."""

import torch
from jaxtyping import Float
from torch import Tensor

PANEL = 2048
"""Rows of the Gram matrix that are summed at a time: wide enough for full speed, and all there is on narrow layers."""


def add_gram(gram: Float[Tensor, "I I"], x: Float[Tensor, "T I"]) -> None:
    """gram += x^T x, in place.

    T I (I + PANEL) FLOP, and PANEL rows of additional memory; none on a GPU, where bf16 tokens go into the tensor cores
    as they are: the product of two bf16 numbers is exact in the float32 in which it is summed. A Gram matrix that lies
    on the host costs a copy of itself per call.
    """
    in_bf16 = x.is_cuda and x.dtype == torch.bfloat16
    x = x if in_bf16 else x.float()
    for low in range(0, x.shape[1], PANEL):
        high = low + PANEL
        panel, left, right = gram[low:high, low:], x[:, low:high].T, x[:, low:]
        if in_bf16 and gram.is_cuda:
            torch.addmm(panel, left, right, out_dtype=torch.float32, out=panel)
        elif in_bf16:
            panel += torch.mm(left, right, out_dtype=torch.float32).to(gram.device)
        else:
            panel += (left @ right).to(gram.device)
        gram[high:, low:high] = gram[low:high, high:].T
