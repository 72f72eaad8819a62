"""Round to nearest (RTN): the baseline, and what Quant Experts and most other methods start from."""

from dataclasses import dataclass

from torch import Tensor

from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import Codes
from qe_dist.numerics.clipping import clipped_scale
from qe_dist.numerics.grid import round_to_grid, weight_scale
from qe_dist.numerics.stats import GroupStats, Needs


@dataclass(frozen=True)
class RoundToNearest:
    """Every weight to the nearest point of its own grid."""

    clip: bool = False
    """Whether grids may cut off large weights, where that makes the output's error smaller."""

    def needs(self) -> Needs:
        return Needs(gram=self.clip)

    def fit(self, weight: Tensor, stats: GroupStats, scheme: Scheme) -> Codes:
        bits, size = scheme.weight_bits, scheme.group_size
        scale = clipped_scale(weight, bits, size, stats.total_gram) if self.clip else weight_scale(weight, bits, size)
        return Codes(round_to_grid(weight, scale, bits), scale)


METHOD = RoundToNearest
