"""Number formats of a quantized linear, written like `w4a6`, `w3a16g128` or `w4a4k32`."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from qe_dist.core.errors import ConfigError

Arithmetic = Literal["a16", "int8"]
"""What the product of a quantized linear executes on a GPU: `a16`, weights and activations in 16 bits on the 16-bit
tensor cores; `int8`, both as integers on the int8 ones. Nothing here executes fp8."""
ARITHMETICS: tuple[Arithmetic, ...] = get_args(Arithmetic)

_PATTERN = re.compile(r"w(?P<w>\d+)a(?P<a>\d+)(?:k(?P<k>\d+))?(?:g(?P<g>\d+))?")


@dataclass(frozen=True)
class Scheme:
    """Symmetric integers: weights by output channel or group, activations by token at run time."""

    weight_bits: int
    act_bits: int | None = None
    """None: activations stay in 16 bits."""
    group_size: int | None = None
    """Input channels that share a scale; None: one scale per output channel."""
    dynamic_outliers: int | None = None
    """Dynamic outlier channels: the largest of each token, which stay in 16 bits among the rounded ones, so that its
    grid only has to reach the others (fewer on narrow layers, `numerics.lowrank.capped`). None: all are rounded."""

    def __post_init__(self) -> None:
        if not 2 <= self.weight_bits <= 8:
            raise ConfigError(f"weight bits must be 2 to 8, found {self.weight_bits}")
        if self.act_bits is not None and not 3 <= self.act_bits <= 8:
            raise ConfigError(f"activation bits must be 3 to 8, or 16 for none, found {self.act_bits}")
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            raise ConfigError(f"group size must be a positive multiple of 8, found {self.group_size}")

        if self.dynamic_outliers is not None and self.dynamic_outliers < 1:
            raise ConfigError(f"dynamic outlier channels must be at least 1, found {self.dynamic_outliers}")
        if self.dynamic_outliers is not None and self.act_bits is None:
            raise ConfigError(
                "activations of 16 bits have no grid that dynamic outlier channels could leave; leave out "
                f"k{self.dynamic_outliers}"
            )

    @property
    def arithmetic(self) -> Arithmetic:
        """`int8` where every value of the product's activations is a point of an integer grid. Unrounded values among
        them, such as dynamic outlier channels, share an operand with the rounded ones and make the product `a16`."""
        return "int8" if self.act_bits is not None and self.dynamic_outliers is None else "a16"

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """`w4a8`, `w3a16g128` or `w4a4k32`; a16 means that activations are not quantized."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ConfigError(f"scheme {text!r} is not of the form w4a8, w3a16g128 or w4a4k32")
        act = int(match["a"])
        group, outliers = (int(match[x]) if match[x] else None for x in ("g", "k"))
        return cls(int(match["w"]), None if act == 16 else act, group, outliers)

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.group_size else ""
        outliers = f"k{self.dynamic_outliers}" if self.dynamic_outliers else ""
        return f"w{self.weight_bits}a{self.act_bits or 16}{outliers}{group}"
