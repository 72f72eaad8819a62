"""The one container that every recipe fills, and its tensors' names on disk.

    y = Qa(x~) W^T + (x~ A_s) B_s + (x~ A_e) B_e,    x~ = x H / input_scale,    e = argmin_i (router |x|)_i

H is the rotation at run time, the same for each block of the channels; without one it is the identity. Where there are
experts and no router, the token's modality is its expert: none for text, the first for images.

What belongs to the input of a group (scale, down matrices A, router) is stored once per group, under the
module `<group>_input`; codes, scales and up matrices B are stored per linear. An expert may also *extract*
channels: they leave Qa, and the expert multiplies them with `columns` in 16 bits. *Salient* channels stay in Qa, and
their weights have a second term: `salient_columns`, which meets Qa(x~) as the codes do.
Letters: T tokens, I inputs, O outputs, G scale groups, R rank, E experts, C channels of the shared expert,
D of a routed one, S salient channels, M modalities, H router inputs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, Int8, Shaped
from torch import Tensor

from qe_dist.core.scheme import Arithmetic, Scheme


@dataclass(frozen=True)
class Factor:
    """A matrix of a low-rank pair, or salient columns, as stored: bf16, or integers with one scale per row: int8, or
    two 4-bit codes + 8 in each uint8, the even column in the lower half."""

    values: Shaped[Tensor, "*rows stored"]
    scale: Float[Tensor, "*rows"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, not of its packed form."""
        *rows, stored = self.values.shape
        return (*rows, 2 * stored if self.values.dtype == torch.uint8 else stored)

    @property
    def dense(self) -> Float[Tensor, "*rows columns"]:
        """The matrix in float32."""
        if self.scale is None:
            return self.values.float()
        codes = self.values.float()
        if self.values.dtype == torch.uint8:
            codes = torch.stack((self.values & 15, self.values >> 4), dim=-1).flatten(-2).float() - 8
        return codes * self.scale.float()[..., None]


@dataclass(frozen=True)
class GroupInput:
    """What happens to the tensor that the linears of a group share."""

    input_scale: Float[Tensor, "M I"] | None = None
    """x~ = x H / input_scale; one row, or one per modality."""
    shared_down: Factor | None = None  # [R, I]
    shared_channels: Int[Tensor, " C"] | None = None
    expert_down: Factor | None = None  # [E, R, I]
    expert_channels: Int[Tensor, "E D"] | None = None
    router: Float[Tensor, "E H"] | None = None
    salient_channels: Int[Tensor, " S"] | None = None
    rotation: tuple[Int8[Tensor, "_ _"], ...] = ()
    """Hadamard factors of H, as `numerics.hadamard.online_factors` makes them."""

    @property
    def num_experts(self) -> int:
        """The number of routed experts; 0 where there are none."""
        down = None if self.expert_down is None else self.expert_down.values
        return next((len(t) for t in (self.router, down, self.expert_channels) if t is not None), 0)

    @property
    def by_modality(self) -> bool:
        """Whether a token's modality decides its scale or, without a router, its expert."""
        own_scales = self.input_scale is not None and len(self.input_scale) > 1
        return own_scales or (self.router is None and self.num_experts > 0)


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear of a group: its codes and scales, and its part of the repair."""

    codes: Int8[Tensor, "O I"]
    scale: Float[Tensor, "O G"]
    bias: Shaped[Tensor, " O"] | None = None
    shared_up: Factor | None = None  # [O, R]
    shared_columns: Float[Tensor, "O C"] | None = None
    expert_up: Factor | None = None  # [E, O, R]
    expert_columns: Float[Tensor, "E O D"] | None = None
    salient_columns: Factor | None = None  # [O, S]


@dataclass(frozen=True)
class FitReport:
    """How well a group was fitted, and what it costs; errors are relative to the output."""

    arithmetic: Arithmetic
    """What the product executes."""
    error: float | None
    """Error on the token sample, which the fit has seen. None where no token could be measured."""
    error_by_modality: Mapping[str, float]
    held_out_error: float | None
    """Error on tokens of calibration sequences that are in no statistic. None where none are held out."""
    held_out_error_by_modality: Mapping[str, float]
    rounding_error: float | None
    """Error of the same codes without compensation."""
    bytes: int
    """Stored bytes of codes, scales, factors, columns and router."""
    active_bytes: int
    """Bytes of them that one token needs: all but the experts that it does not use."""
    macs: Mapping[Arithmetic, int]
    """Multiplications for one token, by what executes them."""
    seconds: float
    """Time of the fit. It is in no checkpoint, since it differs from call to call."""
    fallbacks: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "FitReport":
        """Reads a group of a manifest. TypeError where fields are missing or unknown."""
        return cls(**{**said, "fallbacks": tuple(said["fallbacks"]), "seconds": 0.0})

    def to_json(self) -> dict[str, Any]:
        """Writes what `from_json` reads."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}


@dataclass(frozen=True)
class QuantizedGroup:
    """An input group as it is stored, and how well it was fitted."""

    scheme: Scheme
    input: GroupInput
    linears: Mapping[str, QuantizedLinear]
    report: FitReport | None = field(default=None, compare=False)


ROTATION = "rotation_"
"""Begins the name of each factor of a rotation."""
_INPUT_FACTORS = {"lr_shared_a": "shared_down", "lr_expert_a": "expert_down"}
_INPUT_PLAIN = {
    "input_scale": "input_scale",
    "lr_shared_channels": "shared_channels",
    "lr_expert_channels": "expert_channels",
    "router": "router",
    "lr_salient_channels": "salient_channels",
}
_LINEAR_FACTORS = {
    "lr_shared_b": "shared_up",
    "lr_expert_b": "expert_up",
    "lr_salient_columns": "salient_columns",
}
_LINEAR_PLAIN = {
    "bias": "bias",
    "lr_shared_columns": "shared_columns",
    "lr_expert_columns": "expert_columns",
}


def _to_tensors(part: object, factors: dict[str, str], plain: dict[str, str]) -> dict[str, Tensor]:
    tensors = {}
    for name, attribute in factors.items():
        factor: Factor | None = getattr(part, attribute)
        if factor is not None:
            tensors[name] = factor.values
            if factor.scale is not None:
                tensors[f"{name}_scale"] = factor.scale
    for name, attribute in plain.items():
        if getattr(part, attribute) is not None:
            tensors[name] = getattr(part, attribute)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _from_tensors(tensors: Mapping[str, Tensor], factors: dict[str, str], plain: dict[str, str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, attribute in factors.items():
        if name in tensors:
            fields[attribute] = Factor(tensors[name], tensors.get(f"{name}_scale"))
    return fields | {a: tensors[n] for n, a in plain.items() if n in tensors}


def input_tensors(part: GroupInput) -> dict[str, Tensor]:
    """The group's own tensors by their names within the module `<group>_input`."""
    rotation = {f"{ROTATION}{i}": factor for i, factor in enumerate(part.rotation)}
    return _to_tensors(part, _INPUT_FACTORS, _INPUT_PLAIN) | rotation


def input_from_tensors(tensors: Mapping[str, Tensor]) -> GroupInput:
    """The inverse of `input_tensors`; tensors of other names are left out."""
    names = sorted((n for n in tensors if n.startswith(ROTATION)), key=lambda n: int(n.removeprefix(ROTATION)))
    fields = _from_tensors(tensors, _INPUT_FACTORS, _INPUT_PLAIN)
    return GroupInput(**fields, rotation=tuple(tensors[n] for n in names))


def repair_tensors(linear: QuantizedLinear) -> dict[str, Tensor]:
    """A linear's tensors other than its codes and scales, by their names within the linear."""
    return _to_tensors(linear, _LINEAR_FACTORS, _LINEAR_PLAIN)


def repair_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of `QuantizedLinear` beside `codes` and `scale`."""
    return _from_tensors(tensors, _LINEAR_FACTORS, _LINEAR_PLAIN)


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The bytes of all these tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no floating-point tensor has a NaN or Inf."""
    return all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())
