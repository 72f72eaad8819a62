"""Round to nearest (RTN): the baseline, and what Quant Experts and most other methods start from."""

from dataclasses import dataclass

from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import Codes
from qe_dist.numerics.clipping import clipped_scale
from qe_dist.numerics.grid import full_range_scale, round_to_grid, weight_scale
from qe_dist.numerics.stats import GroupStats, Needs


@dataclass(frozen=True)
class RoundToNearest:
    """Every weight to the nearest point of its own grid."""

    clip: bool = False
    """Whether grids may cut off large weights, where that makes the output's error smaller."""
    full_range: bool = False
    """Whether scales are signed, so that the largest weight has the code that has no counterpart (-8 at 4 bits)."""

    def __post_init__(self) -> None:
        if self.clip and self.full_range:
            raise ConfigError("quantizer.clip searches for positive scales; choose clip or full_range")

    def needs(self) -> Needs:
        return Needs(gram=self.clip)

    def fit(self, weight: Tensor, stats: GroupStats, scheme: Scheme) -> Codes:
        bits, size = scheme.weight_bits, scheme.group_size
        if self.clip:
            scale = clipped_scale(weight, bits, size, stats.total_gram)
        else:
            scale = (full_range_scale if self.full_range else weight_scale)(weight, bits, size)
        return Codes(round_to_grid(weight, scale, bits), scale)


METHOD = RoundToNearest
