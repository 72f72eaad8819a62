"""Round to nearest: the baseline, and what Quant Experts and its rivals start from (methods.md section 1.2)."""

from dataclasses import dataclass

from torch import Tensor

from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import Codes
from qe_dist.numerics.grid import round_to_grid, weight_scale
from qe_dist.numerics.stats import GroupStats, Needs


@dataclass(frozen=True)
class RoundToNearest:
    """Every weight to the nearest point of its own grid."""

    def needs(self) -> Needs:
        return Needs()

    def fit(self, weight: Tensor, stats: GroupStats, scheme: Scheme) -> Codes:
        scale = weight_scale(weight, scheme.weight_bits, scheme.group_size)
        return Codes(round_to_grid(weight, scale, scheme.weight_bits), scale)


METHOD = RoundToNearest
