"""What a quantized group costs: bytes on disk, and bytes and multiplications for one token."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qe_dist.core.quantized import Factor, GroupInput, QuantizedGroup, QuantizedLinear
from qe_dist.core.scheme import ARITHMETICS, Arithmetic


@dataclass(frozen=True)
class Cost:
    """What a group takes on disk, and what one token takes of it."""

    stored: int
    """Bytes of codes, scales, factors, columns and router."""
    active: int
    """Those of them that one token needs: all but the experts that it does not use."""
    macs: Mapping[Arithmetic, int]
    """Multiplications for one token, by what executes them: of the codes in the arithmetic of the scheme, of factors,
    columns, the router and the factors of a rotation in `a16`. Scaling, choosing and rounding activations is not
    counted."""


def cost_of(group: QuantizedGroup) -> Cost:
    """Dynamic outlier channels cost nothing of this: they are operands of the same product, which they make `a16`."""
    stored = active = 0
    macs = dict.fromkeys(ARITHMETICS, 0)
    for linear in group.linears.values():
        outputs, inputs = linear.codes.shape
        words = -(-inputs * group.scheme.weight_bits // 32)  # of a packed row
        base = 4 * outputs * words + linear.scale.nbytes
        stored, active = stored + base, active + base
        macs[group.scheme.arithmetic] += outputs * inputs
    rotation = group.input.rotation
    stored, active = (total + sum(factor.nbytes for factor in rotation) for total in (stored, active))
    macs["a16"] += inputs * sum(len(factor) for factor in rotation)
    parts: list[GroupInput | QuantizedLinear] = [group.input, *group.linears.values()]
    for part in parts:
        for name, matrix in _repairs(part):
            share = matrix.shape[0] if name.startswith("expert_") else 1
            stored, active = stored + _bytes(matrix), active + _bytes(matrix) // share
            if name.endswith(("_down", "_up", "_columns", "router")):
                macs["a16"] += math.prod(matrix.shape) // share
    return Cost(stored, active, macs)


def _repairs(part: GroupInput | QuantizedLinear) -> list[tuple[str, Any]]:
    own = ("codes", "scale", "bias", "rotation")
    return [(name, value) for name, value in vars(part).items() if value is not None and name not in own]


def _bytes(matrix: Factor | Tensor) -> int:
    if isinstance(matrix, Factor):
        return matrix.values.nbytes + (0 if matrix.scale is None else matrix.scale.nbytes)
    return matrix.nbytes
