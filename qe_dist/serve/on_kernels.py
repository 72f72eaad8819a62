"""Input groups and linears by the Triton kernels, in 16 bits on a GPU. The twin of `on_reference`."""

from typing import Any, NamedTuple

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
from qe_kernels.dispatch import Device
from qe_kernels.plans import DownPlan, LinearPlan, QuantizePlan
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
        self.part, self.scheme, self.columns = part, scheme, columns
        self.rotation = unit(part.rotation, torch.float32)
        self.factors = _down(part.shared_down), _down(part.expert_down)
        given = (part.shared_channels, part.expert_channels, part.salient_channels)
        shared, experts, salient = (None if c is None else padded_channels(c, columns) for c in given)
        extracts = shared is not None or experts is not None
        self.how: dict[str, Any] = {
            "bits": scheme.act_bits,
            "outliers": dynamic_outliers(scheme, columns),
            "int8": scheme.arithmetic == "int8",
            "input_scale": part.input_scale,
            "shared_channels": shared,
            "expert_channels": experts,
            "extracted": extracted_columns(columns, shared, experts) if extracts else None,
            "salient_channels": salient,
            "with_x": self.factors != (None, None),
        }
        self.quantize = QuantizePlan(columns, **self.how)
        self.down: DownPlan | None = None
        self.route: DownPlan | None = None

    def choose(self, routers: Tensor, x: Tensor) -> Tensor:
        """The experts [T, M] that T routers [T, E, H] choose for x [M, H]."""
        x, device = x.contiguous(), planned(x)
        if device is None:
            return ops.route(routers, x)
        if self.route is None:
            self.route = DownPlan(device, x.shape[1], None, None, routers)
        expert = self.route(x, x).expert
        assert expert is not None  # there are routers
        return expert

    def prepare(self, x: Tensor, expert: Tensor | None, modality: Tensor | None) -> Prepared:
        """expert [M]: from the router; modality [M]: where scales or experts follow it."""
        if self.rotation:
            x = ops.rotate(x.contiguous(), self.rotation)
        if expert is None and self.part.num_experts:
            assert modality is not None, "experts without a router need the tokens' modality"
            expert = modality.int() - 1
        x, device = x.contiguous(), planned(x)
        if device is None:
            made = ops.quantize(x, **self.how, modality=modality, expert=expert)
            return Prepared(made, None if made.x is None else ops.down(made.x, *self.factors, expert=expert), expert)
        made = self.quantize(x, modality, expert)
        if made.x is None:
            return Prepared(made, None, expert)
        if self.down is None:
            self.down = DownPlan(device, self.columns, *self.factors)
        return Prepared(made, self.down(made.x, None, expert), expert)


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
        self.plans: dict[tuple[torch.dtype, bool], LinearPlan] = {}
        """The plan for each dtype, with and without a bias."""

    def words(self) -> Tensor:
        """The weights as in the checkpoint."""
        return pack(unpack_weight(self.weight)[0], self.weight.bits)

    def __call__(self, x: Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        base, token_scale, zs = x.activations.base, x.activations.token_scale, self._zs(x)
        device = planned(base)
        if device is None:
            return ops.linear(base, token_scale, self.weight, self._branches(zs), x.expert, bias, out_dtype=dtype)
        key = (dtype, bias is None)
        if key not in self.plans:
            self.plans[key] = LinearPlan(device, self.weight, self._branches(zs), dtype)
        return self.plans[key](base, token_scale, list(zs.values()), x.expert, bias)

    def _zs(self, x: Prepared) -> dict[str, Tensor]:
        """What meets each of the factors and columns of this linear."""
        down, made = x.down or Down(None, None, None), x.activations
        every = {
            "shared_up": down.shared_z,
            "shared_columns": made.shared_z,
            "expert_up": down.expert_z,
            "expert_columns": made.expert_z,
            "salient_columns": made.salient_z,
        }
        return {name: z for name, z in every.items() if z is not None}

    def _branches(self, zs: dict[str, Tensor]) -> list[Branch]:
        return [
            Branch(z, self.ups[name], self.experts if name.startswith("expert") else None) for name, z in zs.items()
        ]


def planned(tensor: Tensor) -> Device | None:
    """The GPU for which calls are planned. None for a device without kernels, and while torch.compile traces: it sees
    the custom ops."""
    return None if torch.compiler.is_compiling() else ops.device_of(tensor.device)


def dynamic_outliers(scheme: Scheme, columns: int) -> int:
    return 0 if scheme.dynamic_outliers is None else capped(columns, scheme.dynamic_outliers)


def _factor(stored: Factor | Tensor) -> tuple[Tensor, Tensor | None]:
    return (stored.values, stored.scale) if isinstance(stored, Factor) else (stored, None)


def _down(stored: Factor | None) -> tuple[Tensor, Tensor | None] | None:
    return None if stored is None else padded_down(_factor(stored))
