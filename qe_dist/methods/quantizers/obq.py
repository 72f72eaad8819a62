"""OBQ: each row rounds its channels in an order of its own, the cheapest first (arXiv 2208.11580, numerics/obq.py).

It takes outputs x inputs^3 steps, so it is for narrow layers, of `widest` inputs at most: 960 x 576 weights take
minutes of one core, and each doubling of the width takes eight times as long.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import Codes
from qe_dist.numerics.gptq import gptq
from qe_dist.numerics.obq import obq
from qe_dist.numerics.stats import GroupStats, Needs


@dataclass(frozen=True)
class OBQ:
    """Rounds one channel of a row after the other, always the one that then costs least."""

    widest: int = 768
    """Inputs of a layer."""
    above: Literal["refuse", "gptq"] = "refuse"
    """What happens to wider layers."""
    damping: float = 0.01
    """What is added to the Gram matrix's diagonal, as a share of its mean."""

    def __post_init__(self) -> None:
        if self.widest < 1 or not 0 <= self.damping < float("inf"):
            raise ConfigError(
                "quantizer.widest must be at least 1 and .damping neither negative nor infinite, "
                f"found {self.widest} and {self.damping}"
            )

    def needs(self) -> Needs:
        return Needs(gram=True)

    def check_layer(self, name: str, inputs: int) -> None:
        if inputs > self.widest and self.above == "refuse":
            raise ConfigError(
                f"{name} has {inputs} inputs, and obq takes {self.widest} at most, for its cost grows with their cube; "
                'set quantizer.above = "gptq" to round wider layers by GPTQ, or quantizer.widest and wait'
            )

    def fit(self, weight: Tensor, stats: GroupStats, scheme: Scheme) -> Codes:
        if weight.shape[1] > self.widest:
            found = gptq(
                weight, stats.total_gram, scheme.weight_bits, scheme.group_size, damping=self.damping, act_order=True
            )
        else:
            found = obq(weight, stats.total_gram, scheme.weight_bits, scheme.group_size, damping=self.damping)
        return Codes(*found)


METHOD = OBQ
