"""Input groups and linears by the formula in plain torch: on any device, in any precision. The twin of `on_kernels`."""

from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import Tensor

from qe_dist.core.quantized import GroupInput, QuantizedLinear
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.grid import dequantize
from qe_dist.numerics.packing import pack, unpack
from qe_dist.numerics.reference import PreparedInput, linear_forward, prepare, route
from qe_dist.numerics.routing import choose_experts

Repair = Mapping[str, Any]
"""Factors and tensors by name, see `core.quantized.repair_from_tensors`."""
SPARED = 0.01
"""Share of the free memory that the unpacked weights of one linear may take."""


class Input:
    def __init__(self, part: GroupInput, scheme: Scheme, columns: int) -> None:
        self.part, self.scheme = part, scheme

    def choose(self, routers: Tensor, x: Tensor) -> Tensor:
        """The experts [T, M] that T routers [T, E, H] choose for x [M, H]."""
        return torch.stack([choose_experts(x, router) for router in routers])

    def prepare(self, x: Tensor, expert: Tensor | None, modality: Tensor | None) -> PreparedInput:
        """expert [M]: from the router; modality [M]: where scales or experts follow it."""
        if expert is None:
            expert = route(self.part, None, modality)
        return prepare(self.part, x, expert, self.scheme, modality)


class Linear:
    """Weights are unpacked once. They stay multiplied by their scales where memory allows, as codes where not."""

    def __init__(self, words: Tensor, scale: Tensor, repair: Repair, scheme: Scheme, columns: int) -> None:
        self.bits = scheme.weight_bits
        self.linear = QuantizedLinear(unpack(words, scheme.weight_bits, columns), scale, **repair)
        room = 4 * self.linear.codes.numel() < SPARED * psutil.virtual_memory().available
        self.weight = dequantize(self.linear.codes, scale) if room and words.device.type == "cpu" else None

    def words(self) -> Tensor:
        """The weights as in the checkpoint."""
        return pack(self.linear.codes, self.bits)

    def __call__(self, x: PreparedInput, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = linear_forward(self.linear, x, self.weight)
        return (y if bias is None else y + bias.float()).to(dtype)
