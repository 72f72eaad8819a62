"""Kernels of others on the same matrix: 4-bit weights of groups of 128, 16-bit tokens.

Written from their public interfaces, and not run yet: kernels.py writes down the reason of a peer that fails.
"""

from collections.abc import Callable

import torch
from cases import Problem
from qe_kernels import unpack_weight
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""x [M, K] -> y [M, N]."""


def gemlite(problem: Problem) -> Product:
    from gemlite.helper import A16W4_HQQ_INT

    codes, scale = unpack_weight(problem.weight)
    zeros = torch.full_like(scale, 8)
    unsigned = (codes + 8).to(torch.uint8)
    return A16W4_HQQ_INT(str(scale.device), scale.dtype).from_weights(unsigned, scale, zeros)


def humming(problem: Problem) -> Product:
    from humming.layer import HummingLayer

    codes, scale = unpack_weight(problem.weight)
    weight = problem.weight
    config = {"quant_method": "gptq", "bits": 4, "group_size": weight.group_size, "sym": True, "desc_act": False}
    layer = HummingLayer(
        shape_n=weight.rows, shape_k=weight.columns, weight_config=config, torch_dtype=scale.dtype
    ).to(scale.device)  # fmt: skip
    shifts = torch.arange(0, 32, 4, device=codes.device, dtype=torch.int32)
    nibbles = (codes.t().int() + 8).unflatten(0, (-1, 8))  # GPTQ: eight inputs to a word, [K/8, N]
    words = (nibbles << shifts[:, None]).sum(dim=1, dtype=torch.int32)
    layer.load_from_tensors({"qweight": words, "scales": scale.t().contiguous()})
    layer.transform()
    return lambda x: layer(inputs=x)


PEERS: dict[str, Callable[[Problem], Product]] = {"gemlite": gemlite, "humming": humming}
