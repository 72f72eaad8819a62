"""An input group of a quantized model on a CPU, fast, and with experts that need not come from a router.

Integer products are those of int8 cores, exact. Branches, and products whose activations are not rounded, take bf16 in
and give bf16 out, as a GPU does; every recipe alike. A test holds this against `numerics/reference.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qe_dist.core.quantized import QuantizedGroup
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.grid import dequantize
from qe_dist.numerics.routing import choose_experts

Routing = Literal["router", "random", "oracle"]
"""Who chooses the expert of a token. random: a fixed hash of the token, another one in each group. oracle: whoever
knows the output in full precision, and takes the expert that leaves the least error."""


@dataclass(frozen=True)
class Weight:
    """Codes of all linears of a group, one above the other."""

    codes: Tensor
    scale: Float[Tensor, " O"] | None
    """None: the codes are multiplied by their scales already."""
    scheme: Scheme

    @classmethod
    def of(cls, group: QuantizedGroup) -> "Weight":
        codes = torch.cat([x.codes for x in group.linears.values()])
        scale = torch.cat([x.scale for x in group.linears.values()])
        if group.scheme.act_bits is None or group.scheme.group_size is not None:
            return cls(dequantize(codes, scale).bfloat16(), None, group.scheme)
        return cls(codes.contiguous(), scale.float().squeeze(1), group.scheme)

    def times(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        """Qa(x) W^T."""
        if self.scale is None:
            assert self.scheme.act_bits is None, "formats with scale groups and rounded activations are not built"
            return (x.bfloat16() @ self.codes.T).float()
        top = 2 ** (self.scheme.act_bits - 1) - 1
        step = (x.abs().amax(dim=1, keepdim=True) / top).clamp_min(torch.finfo(x.dtype).tiny)
        codes = torch.round(x / step).clamp(-top, top).to(torch.int8)
        return torch._int_mm(codes, self.codes.T).float() * step * self.scale


class Group:
    """Computes the outputs of all linears of a group, side by side."""

    def __init__(self, group: QuantizedGroup, weight: Weight, routing: Routing, full: Tensor | None, salt: int) -> None:
        """full: the weights in full precision [O, I], for the oracle. salt: of the hash."""
        self.part, self.weight, self.routing, self.full, self.salt = group.input, weight, routing, full, salt
        part, linears = group.input, group.linears.values()
        self.scale = None if part.input_scale is None else part.input_scale.float()
        assert self.scale is None or len(self.scale) == 1, "scales by modality are not built"
        self.pairs: list[tuple[Tensor, Tensor]] = []
        """(down, up) of the shared expert, then of the routed ones, in bf16."""
        if part.shared_down is not None:
            up = torch.cat([x.shared_up.dense for x in linears])
            self.pairs.append((part.shared_down.dense.bfloat16(), up.bfloat16()))
        if part.expert_down is not None:
            ups = torch.cat([x.expert_up.dense for x in linears], dim=1)
            self.pairs += zip(part.expert_down.dense.bfloat16(), ups.bfloat16(), strict=True)

    def __call__(
        self, x: Float[Tensor, "T I"], router_x: Float[Tensor, "T H"], keys: Int[Tensor, " T"]
    ) -> Float[Tensor, "T O"]:
        moved = x if self.scale is None else x / self.scale
        y, narrow = self.weight.times(moved), moved.bfloat16()
        if self.pairs:
            y += _branch(narrow, self.pairs[0])
        if len(self.pairs) > 1:
            self._add_experts(y, x, narrow, router_x, keys)
        return y

    def _add_experts(self, y: Tensor, x: Tensor, narrow: Tensor, router_x: Tensor, keys: Tensor) -> None:
        experts = self.pairs[1:]
        if self.routing == "oracle":
            missing = x @ self.full.T - y
            chosen = torch.stack([(missing - _branch(narrow, pair)).norm(dim=1) for pair in experts], dim=1).argmin(1)
        elif self.routing == "random":
            chosen = hashed(keys, self.salt, len(experts))
        else:
            chosen = choose_experts(router_x, self.part.router)
        for e, pair in enumerate(experts):
            rows = (chosen == e).nonzero().squeeze(1)
            y.index_add_(0, rows, _branch(narrow[rows], pair))


def _branch(x: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    down, up = pair
    return ((x @ down.T) @ up.T).float()


def hashed(keys: Int[Tensor, " T"], salt: int, count: int) -> Int[Tensor, " T"]:
    """A number below `count` for every token, from its key."""
    mixed = (keys ^ (salt * 0x9E3779B97F4A7C1 & 0x7FFFFFFFFFFFFFFF)) * -4658895280553007687
    return ((mixed >> 33) & 0x3FFFFFFF) % count


class Block:
    """Puts groups in the place of a block's linears; which ones may change before each call."""

    def __init__(self, module: torch.nn.Module, linears: Mapping[str, tuple[str, ...]], routes: Mapping[str, str]):
        """linears: names by group. routes: the group whose input a group's router reads."""
        self.routes, self.keys, self.groups = routes, torch.zeros(0), {}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, dict[str, Tensor]] = {}
        for group, names in linears.items():
            sizes = [module.get_submodule(n).out_features for n in names]
            for name in names:
                linear = module.get_submodule(name)
                linear.forward = self._forward(group, name, names, sizes, linear.bias)

    def use(self, groups: Mapping[str, Group], keys: Int[Tensor, "B L"]) -> None:
        """For the next call. keys: of its tokens."""
        self.groups, self.keys, self.inputs, self.outputs = groups, keys.flatten(), {}, {}

    def _forward(self, group: str, name: str, names: tuple[str, ...], sizes: list[int], bias: Tensor | None):
        def forward(x: Tensor) -> Tensor:
            if group not in self.outputs:  # the first of its linears computes them all
                self.inputs[group] = x.flatten(0, 1)
                y = self.groups[group](self.inputs[group], self.inputs[self.routes[group]], self.keys)
                self.outputs[group] = dict(zip(names, y.split(sizes, dim=1), strict=True))
            y = self.outputs[group][name].unflatten(0, x.shape[:2])
            return y if bias is None else y + bias

        return forward
