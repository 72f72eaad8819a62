"""Trainable twins of the linears of an input group: what runs is learned, as it runs (SignRound, arXiv 2309.05516).

    code  = clamp(round(W' / s + offset)),   s = bf16(s_0 clip),   |offset| <= 1/2
    y     = Qa(x~) (code s)^T + (x~ A) B + x~[extracted] columns

Rounding, the bf16 of scales and the grid of the factors are as stored; their gradient is that of the identity
(straight-through). So the twin equals `numerics.reference` bit for bit, at the start, at the end and between.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from qe_dist.core.quantized import QuantizedGroup, QuantizedLinear
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.factors import store_factor
from qe_dist.numerics.grid import dequantize, round_activations
from qe_dist.numerics.hadamard import rotate_blocks, unit
from qe_dist.numerics.reference import PreparedInput, linear_forward, prepare
from qe_dist.numerics.sign_sgd import Learned

MOVED = 0.25
"""Steps from the centre of its code's cell, towards the weight, where a weight starts whose code is not the nearest."""
CLIPS = (0.25, 1.25)
"""Bounds of the learned factor of a scale."""


class _Weight(torch.autograd.Function):
    """(offset, clip) -> the dequantized weight. The gradient of a scale is that of LSQ (arXiv 1902.08153)."""

    @staticmethod
    def forward(ctx: Any, offset: Tensor, clip: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        wide = _stored_scale(scale, clip)[..., None]
        ratio = _by_group(weight, scale) / wide
        rounded = (ratio + _by_group(offset, scale)).round_()
        codes = rounded.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        inside = codes == rounded
        ctx.save_for_backward(wide, scale, inside, torch.where(inside, codes - ratio, codes))
        return (codes * wide).flatten(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide, scale, inside, slope = ctx.saved_tensors
        grouped = _by_group(grad, scale)
        return (grouped * wide).mul_(inside).flatten(1), (grouped * slope).sum(-1) * scale, None, None, None


class _Through(torch.autograd.Function):
    """value, as rounded -> rounded, with the gradient of the value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _through(exact: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, whose gradient goes to `exact` as it is."""
    passed: Tensor = _Through.apply(exact, rounded)  # type: ignore[no-untyped-call]
    return passed


def _by_group(matrix: Float[Tensor, "O I"], scale: Float[Tensor, "O G"]) -> Float[Tensor, "O G S"]:
    grouped: Tensor = matrix.unflatten(1, (scale.shape[1], -1))
    return grouped


def _stored_scale(scale: Tensor, clip: Tensor) -> Tensor:
    return (scale * clip).bfloat16().float()


class TunedLinear:
    """The weight of one linear while it is learned."""

    def __init__(self, weight: Float[Tensor, "O I"], start: QuantizedLinear, bits: int) -> None:
        """weight: in the coordinates of the codes. start: gives the first codes, whatever quantizer chose them."""
        self.bits, self.scale = bits, start.scale.float()
        wide, codes = self.scale[..., None], _by_group(start.codes.float(), self.scale)
        grouped = _by_group(weight, self.scale)
        nearest = (grouped / wide).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        beside = (codes + MOVED * (nearest - codes).sign()) * wide
        self.weight = torch.where(nearest == codes, grouped, beside).flatten(1)
        self.offset = nn.Parameter(torch.zeros_like(self.weight))
        self.clip = nn.Parameter(torch.ones_like(self.scale))
        self.up = None if start.shared_up is None else nn.Parameter(start.shared_up.dense)

    def dequantized(self) -> Float[Tensor, "O I"]:
        """The weight as it runs, with gradients."""
        weight: Tensor = _Weight.apply(self.offset, self.clip, self.weight, self.scale, self.bits)  # type: ignore[no-untyped-call]
        return weight

    @torch.no_grad()
    def codes(self) -> tuple[Int8[Tensor, "O I"], Float[Tensor, "O G"]]:
        """Codes and bf16 scales as they are to be stored."""
        scale = _stored_scale(self.scale, self.clip)
        position = _by_group(self.weight, scale) / scale[..., None] + _by_group(self.offset, scale)
        codes = position.round_().clamp_(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        return codes.flatten(1).to(torch.int8), scale.bfloat16()


@dataclass(frozen=True)
class TunedInput:
    """What the linears of a group read of its input."""

    base: Float[Tensor, "T I"]
    """Qa(x~), extracted channels zero."""
    shared: Float[Tensor, "T R"] | None
    columns: Float[Tensor, "T C"] | None


class TunedGroup:
    """An input group while it is learned: rounding, scales and a shared low-rank pair together."""

    def __init__(self, group: QuantizedGroup, weights: Mapping[str, Float[Tensor, "_ I"]], factor_bits: int) -> None:
        """group: where training starts. weights: those that it stands for, in its coordinates x~, extracted channels
        included. factor_bits: of the low-rank pair as stored."""
        self.scheme: Scheme = group.scheme
        self.start, self.factor_bits = group, factor_bits
        self.channels = None if group.input.shared_channels is None else group.input.shared_channels.long()
        down = group.input.shared_down
        self.down = None if down is None else nn.Parameter(down.dense)
        self.linears = {
            name: TunedLinear(self._rounded_part(weight), group.linears[name], group.scheme.weight_bits)
            for name, weight in weights.items()
        }
        self.weights = weights

    def _rounded_part(self, weight: Tensor) -> Tensor:
        return weight if self.channels is None else weight.index_fill(1, self.channels, 0.0)

    def learned(self, clip_rate: float, factor_rate: float) -> Iterator[Learned]:
        """Everything that training may change. Rates: of scales, in parts of themselves; of factors, in steps of their
        4-bit grid, row by row."""
        for linear in self.linears.values():
            yield Learned(linear.offset, bounds=(-0.5, 0.5))
            yield Learned(linear.clip, clip_rate, CLIPS)
        for factor in (self.down, *(linear.up for linear in self.linears.values())):
            if factor is not None:
                yield Learned(factor, factor_rate * factor.detach().abs().amax(dim=1, keepdim=True) / 7)

    def _stored(self, factor: nn.Parameter) -> Tensor:
        return _through(factor, store_factor(factor.detach(), self.factor_bits).dense)

    def prepare(self, x: Float[Tensor, "T I"]) -> TunedInput:
        """What the linears read, of a group's input."""
        part = self.start.input
        x = rotate_blocks(x.float(), unit(part.rotation, torch.float32))
        if part.input_scale is not None:
            x = x / part.input_scale.float()
        shared = None if self.down is None else x @ self._stored(self.down).T
        columns, base = None, x
        if self.channels is not None:
            columns, base = x[:, self.channels], x.index_fill(1, self.channels, 0.0)
        if self.scheme.act_bits is not None:
            base = _through(base, round_activations(base.detach(), self.scheme))
        return TunedInput(base, shared, columns)

    def linear(self, name: str, x: TunedInput) -> Float[Tensor, "T O"]:
        """Outputs of a linear."""
        linear = self.linears[name]
        y = x.base @ linear.dequantized().T
        up = None if linear.up is None else self._stored(linear.up)
        if x.shared is not None and up is not None:
            y = torch.addmm(y, x.shared, up.T)
        if x.columns is not None:
            y = torch.addmm(y, x.columns, self._columns(name, up).T)
        return y

    @torch.no_grad()
    def quantized(self) -> QuantizedGroup:
        """The group as it is to be stored; what runs from it is, bit for bit, what the twin computes."""
        bits, down = self.factor_bits, self.down
        linears = {}
        for name, linear in self.linears.items():
            codes, scale = linear.codes()
            up = None if linear.up is None else self._stored(linear.up)
            linears[name] = replace(
                self.start.linears[name],
                codes=codes,
                scale=scale,
                shared_up=None if linear.up is None else store_factor(linear.up, bits),
                shared_columns=None if self.channels is None else self._columns(name, up).bfloat16(),
            )
        part = replace(self.start.input, shared_down=None if down is None else store_factor(down, bits))
        return replace(self.start, input=part, linears=linears, report=None)

    def _columns(self, name: str, up: Tensor | None) -> Tensor:
        """Columns of extracted channels, less what the low-rank pair adds there, as `methods.store` rounds them."""
        columns = self.weights[name][:, self.channels]
        if up is not None and self.down is not None:
            columns = columns - up @ self._stored(self.down)[:, self.channels]
        return _through(columns, columns.detach().bfloat16().float())


@runtime_checkable
class Group(Protocol):
    """An input group that runs."""

    def prepare(self, x: Float[Tensor, "T I"]) -> Any:
        """What its linears read."""
        ...

    def linear(self, name: str, x: Any) -> Float[Tensor, "T O"]:
        """Outputs of a linear, without its bias."""
        ...


class FrozenGroup:
    """A quantized group as it is, weights dequantized once."""

    def __init__(self, group: QuantizedGroup) -> None:
        self.group = group
        self.weights = {name: dequantize(one.codes, one.scale) for name, one in group.linears.items()}

    def prepare(self, x: Float[Tensor, "T I"]) -> PreparedInput:
        """Returns what its linears read."""
        return prepare(self.group.input, x, None, self.group.scheme)

    def linear(self, name: str, x: PreparedInput) -> Float[Tensor, "T O"]:
        """Returns the outputs of a linear, without its bias."""
        return linear_forward(self.group.linears[name], x, self.weights[name])


class GroupLinear(nn.Module):
    """Stands in the place of a linear of a block. The first linear of a group prepares the input for all of them."""

    def __init__(self, name: str, bias: Tensor | None, input: "SharedInput") -> None:
        super().__init__()
        self.name, self.bias = name, bias
        self.input = input

    def forward(self, x: Tensor) -> Tensor:
        """Returns the outputs [.., O] of inputs [.., I], in their dtype."""
        y: Tensor = self.input.group.linear(self.name, self.input.prepared(x)).unflatten(0, x.shape[:-1])
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


class SharedInput:
    """The input of a group, prepared once and kept until its last linear has read it."""

    def __init__(self, group: Group, readers: int) -> None:
        self.group, self.readers = group, readers
        self.seen: Tensor | None = None
        self.left, self.kept = 0, None

    def prepared(self, x: Tensor) -> Any:
        """Returns what the group's linears read of x [.., I]."""
        if self.seen is not x:
            self.seen, self.left, self.kept = x, self.readers, self.group.prepare(x.flatten(0, -2))
        kept, self.left = self.kept, self.left - 1
        if not self.left:
            self.seen = self.kept = None
        return kept
