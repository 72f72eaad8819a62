"""Input groups and linears by the Triton kernels, in 16 bits on a GPU. The twin of `on_reference`."""

from typing import NamedTuple

import torch
from qe_kernels import (
    Activations,
    Branch,
    Down,
    extracted_columns,
    ops,
    order_for,
    pack_up,
    pack_weight,
    padded_channels,
    padded_down,
    unpack_weight,
)
from torch import Tensor

from qe_dist.core.quantized import Factor, GroupInput
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.hadamard import unit
from qe_dist.numerics.lowrank import capped
from qe_dist.numerics.packing import pack
from qe_dist.serve.on_reference import Repair


class Prepared(NamedTuple):
    activations: Activations
    down: Down | None
    expert: Tensor | None


class Input:
    def __init__(self, part: GroupInput, scheme: Scheme, columns: int) -> None:
        self.part, self.scheme = part, scheme
        self.rotation = unit(part.rotation, torch.float32)
        self.outliers = dynamic_outliers(scheme, columns)
        self.shared_down, self.expert_down = _down(part.shared_down), _down(part.expert_down)
        given = (part.shared_channels, part.expert_channels, part.salient_channels)
        channels = [None if c is None else padded_channels(c, columns) for c in given]
        self.shared_channels, self.expert_channels, self.salient_channels = channels
        channels = channels[:2]
        self.extracted = None if channels == [None, None] else extracted_columns(columns, *channels)

    def choose(self, routers: Tensor, x: Tensor) -> Tensor:
        """The experts [T, M] that T routers [T, E, H] choose for x [M, H]."""
        return ops.route(routers, x.contiguous())

    def prepare(self, x: Tensor, expert: Tensor | None, modality: Tensor | None) -> Prepared:
        """expert [M]: from the router; modality [M]: where scales or experts follow it."""
        part = self.part
        if self.rotation:
            x = ops.rotate(x.contiguous(), self.rotation)
        if expert is None and part.num_experts:
            assert modality is not None, "experts without a router need the tokens' modality"
            expert = modality.int() - 1
        shared, experts = self.shared_down, self.expert_down
        activations = ops.quantize(
            x.contiguous(),
            bits=self.scheme.act_bits,
            outliers=self.outliers,
            int8=self.scheme.arithmetic == "int8",
            input_scale=part.input_scale,
            modality=modality,
            shared_channels=self.shared_channels,
            expert_channels=self.expert_channels,
            expert=expert,
            extracted=self.extracted,
            salient_channels=self.salient_channels,
            with_x=shared is not None or experts is not None,
        )
        down = None if activations.x is None else ops.down(activations.x, shared, experts, expert=expert)
        return Prepared(activations, down, expert)


class Linear:
    def __init__(self, words: Tensor, scale: Tensor, repair: Repair, scheme: Scheme, columns: int) -> None:
        """`words` are used up: their memory holds the weights in the layout of the device."""
        order = order_for(words.device)
        self.ups = {name: pack_up(_factor(stored), order) for name, stored in repair.items()}
        routed = next((repair[name] for name in ("expert_up", "expert_columns") if name in repair), None)
        self.experts = None if routed is None else routed.shape[0]
        self.weight = pack_weight(
            words, scheme.weight_bits, scale, columns, order, scheme.arithmetic == "int8", scheme.group_size,
            in_place=True,
        )  # fmt: skip

    def words(self) -> Tensor:
        """The weights as in the checkpoint."""
        return pack(unpack_weight(self.weight)[0], self.weight.bits)

    def __call__(self, x: Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        base = x.activations.base, x.activations.token_scale
        return ops.linear(*base, self.weight, self._branches(x), x.expert, bias, out_dtype=dtype)

    def _branches(self, x: Prepared) -> list[Branch]:
        down = x.down or Down(None, None, None)
        pairs = (
            (down.shared_z, "shared_up", None),
            (x.activations.shared_z, "shared_columns", None),
            (down.expert_z, "expert_up", self.experts),
            (x.activations.expert_z, "expert_columns", self.experts),
            (x.activations.salient_z, "salient_columns", None),
        )
        return [Branch(z, self.ups[name], experts) for z, name, experts in pairs if z is not None]


def dynamic_outliers(scheme: Scheme, columns: int) -> int:
    return 0 if scheme.dynamic_outliers is None else capped(columns, scheme.dynamic_outliers)


def _factor(stored: Factor | Tensor) -> tuple[Tensor, Tensor | None]:
    return (stored.values, stored.scale) if isinstance(stored, Factor) else (stored, None)


def _down(stored: Factor | None) -> tuple[Tensor, Tensor | None] | None:
    return None if stored is None else padded_down(_factor(stored))
