"""Number formats of a quantized linear, written like `w4a6g128`."""

import re
from dataclasses import dataclass

from qe_dist.core.errors import ConfigError

_PATTERN = re.compile(r"w(?P<w>\d+)a(?P<a>\d+)(?:g(?P<g>\d+))?")


@dataclass(frozen=True)
class Scheme:
    """Symmetric integers: weights by output channel or group, activations by token at run time."""

    weight_bits: int
    act_bits: int | None = None
    """None: activations stay in 16 bits."""
    group_size: int | None = None
    """Input channels that share a scale; None: one scale per output channel."""

    def __post_init__(self) -> None:
        if not 2 <= self.weight_bits <= 8:
            raise ConfigError(f"weight bits must be 2 to 8, found {self.weight_bits}")
        if self.act_bits is not None and not 3 <= self.act_bits <= 8:
            raise ConfigError(f"activation bits must be 3 to 8, or 16 for none, found {self.act_bits}")
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            raise ConfigError(f"group size must be a positive multiple of 8, found {self.group_size}")

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """`w4a8` or `w3a16g128`; a16 means that activations are not quantized."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ConfigError(f"scheme {text!r} is not of the form w4a8 or w3a16g128")
        act = int(match["a"])
        group = int(match["g"]) if match["g"] else None
        return cls(int(match["w"]), None if act == 16 else act, group)

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.group_size else ""
        return f"w{self.weight_bits}a{self.act_bits or 16}{group}"
