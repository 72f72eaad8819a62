"""Kernels of others on the same matrix: 4-bit weights of groups of 128, 16-bit tokens.

Written from their public interfaces, and not run yet: bench_kernels.py writes down the reason of a peer that fails.
"""

from collections.abc import Callable

import torch
from qe_kernels import unpack_weight
from torch import Tensor

from kernel_bench.cases import Problem

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

    weight = problem.weight
    codes, scale = unpack_weight(weight)
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "type": "int", "num_bits": 4,
        "strategy": "group", "group_size": weight.group_size,
    }  # fmt: skip
    layer = HummingLayer(weight.rows, weight.columns, config, torch_dtype=scale.dtype).to(scale.device)
    shifts = torch.arange(0, 32, 4, device=codes.device, dtype=torch.int32)
    nibbles = (codes + 8).int().unflatten(1, (-1, 8))
    words = (nibbles << shifts).sum(dim=2, dtype=torch.int32)
    shape = torch.tensor([weight.rows, weight.columns])
    layer.load_from_tensors({"weight_packed": words, "weight_scale": scale, "weight_shape": shape})
    layer.transform()
    return layer


PEERS: dict[str, Callable[[Problem], Product]] = {"gemlite": gemlite, "humming": humming}
