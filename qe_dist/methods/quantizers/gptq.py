"""GPTQ: the error of a channel is made up for by the channels that are rounded after it (arXiv 2210.17323).

Departures: numerics/gptq.py computes it without an inverse, and clips by its own error. Calibration is on
full-precision inputs, as everywhere in this project, where the paper's are those of the quantized blocks before.
"""

from dataclasses import dataclass

from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import Codes
from qe_dist.numerics.clipping import clip_factors
from qe_dist.numerics.gptq import gptq
from qe_dist.numerics.stats import GroupStats, Needs

FACTORS = 12
"""Tried by `clip`. 24 gained 1 % more at twice the cost."""


@dataclass(frozen=True)
class GPTQ:
    """Rounds one channel after the other, each with the error of those before it."""

    act_order: bool = True
    """The loudest channels first, with the scales of the weight as it came. Else as they lie, as in the paper, with
    each group's scale taken when its turn comes."""
    damping: float = 0.01
    """What is added to the Gram matrix's diagonal, as a share of its mean. The paper: 0.01."""
    clip: bool = False
    """Whether each row may choose the multiple of its scales that leaves it the least error: 12 times the updates."""

    def __post_init__(self) -> None:
        if not 0 <= self.damping < float("inf"):
            raise ConfigError(f"quantizer.damping must not be negative, nor infinite, found {self.damping}")

    def needs(self) -> Needs:
        return Needs(gram=True)

    def fit(self, weight: Tensor, stats: GroupStats, scheme: Scheme) -> Codes:
        codes, scale = gptq(
            weight,
            stats.total_gram,
            scheme.weight_bits,
            scheme.group_size,
            factors=clip_factors(scheme.weight_bits, FACTORS) if self.clip else (1.0,),
            damping=self.damping,
            act_order=self.act_order,
        )
        return Codes(codes, scale)


METHOD = GPTQ
