"""The modules that run a quantized checkpoint: parameters named as on disk, forward by the reference.

A `GroupInput` module holds what belongs to the tensor that q, k and v (or gate and up) read, and prepares
that tensor once for all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qe_dist.core.quantized import QuantizedLinear, input_from_tensors, repair_from_tensors
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.packing import unpack
from qe_dist.numerics.reference import PreparedInput, linear_forward, prepare, route
from qe_dist.serve.modality import TokenModality


def _add_parameters(module: nn.Module, shapes: Mapping[str, Sequence[Any]]) -> None:
    for name, (dtype, *shape) in shapes.items():
        empty = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))


class QEInput(nn.Module):
    """Scale, down matrices and router of an input group.

    Holds what it prepared only until its last reader has come: the linears of the group, and the groups whose
    router reads this input.
    """

    def __init__(
        self, scheme: Scheme, shapes: Mapping[str, Sequence[Any]], num_linears: int, modality: TokenModality
    ) -> None:
        super().__init__()
        self.scheme, self.modality = scheme, modality
        self.num_linears, self.num_routers = num_linears, 0
        self._router_source: tuple[QEInput, ...] = ()  # in a tuple, so that it is no submodule
        self._seen: Tensor | None = None
        self._prepared: PreparedInput | None = None
        self._linears_left = self._routers_left = 0
        _add_parameters(self, shapes)
        self.by_modality = input_from_tensors(dict(self.named_parameters())).by_modality

    def route_on(self, other: "QEInput") -> None:
        """Lets the router read the input of another group (the replicated one, DESIGN section 6)."""
        if other is not self:
            self._router_source = (other,)
            other.num_routers += 1

    def forward(self, x: Tensor) -> PreparedInput:
        """What the linears of the group share; computed for the first of them, kept for the others. By the call of
        the module, for that is where accelerate brings in the parameters of a module that is offloaded."""
        if self._prepared is None or self._seen is not x:
            part = input_from_tensors(dict(self.named_parameters()))
            rows = x.flatten(0, -2)
            router_rows = self._router_source[0].for_router() if self._router_source else rows
            modality = self.modality.of(rows) if self.by_modality else None
            expert = route(part, router_rows, modality)
            self._prepared = prepare(part, rows, expert, self.scheme, modality)
            self._seen, self._linears_left, self._routers_left = x, self.num_linears, self.num_routers
        prepared = self._prepared
        self._linears_left -= 1
        if self._linears_left == 0:
            self._prepared = None
            if self.num_routers == 0:
                self._seen = None
        return prepared

    def for_router(self) -> Tensor:
        """The tensor that was read last, [T, I]."""
        assert self._seen is not None, "the group whose input the router reads has not run yet"
        rows = self._seen.flatten(0, -2)
        self._routers_left -= 1
        if self._routers_left == 0:
            self._seen = None
        return rows


class QELinear(nn.Module):
    """A quantized linear; the same call as nn.Linear."""

    def __init__(self, scheme: Scheme, shapes: Mapping[str, Sequence[Any]], group: QEInput, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme = scheme
        self._group = (group,)
        _add_parameters(self, shapes)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def quantized(self) -> QuantizedLinear:
        tensors = dict(self.named_parameters())
        codes = unpack(self.weight_packed, self.scheme.weight_bits, self.in_features)
        return QuantizedLinear(codes, self.weight_scale, **repair_from_tensors(tensors))

    def forward(self, x: Tensor) -> Tensor:
        y = linear_forward(self.quantized, self._group[0](x))
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}"
