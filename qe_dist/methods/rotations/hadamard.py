"""Randomized Hadamard rotation of residual stream and attention heads, fused offline, and of down's input at run time.

QuaRot (arXiv 2404.00456, section 4; methods.md section 6): the norms' gains move into the linears behind them, the
stream is rotated in every tensor that writes or reads it (also the vision merger's output), and the values of each head
between v and o. One head's matrix serves all heads and blocks, so heads that share a key and value stay together.
Nothing in front of down can take a rotation (SwiGLU multiplies channel by channel): its input is multiplied by a
Hadamard matrix at run time, and its weight by the same offline.

Departures: o's input is mixed within heads alone, not across them at run time, too (nor does SpinQuant, arXiv
2405.16406); q and k are not rotated behind RoPE, which is for a quantized cache. The head's matrix has random signs too
[INF]. Down's input is rotated in blocks, of the largest product of known orders that divides an eighth of its width, so
that up to eight tensor-parallel ranks can share it out. Embeddings, head and merger are rotated in float64 and stored
in the source's dtype. Bands are ours, and off by default: a channel whose gain is 50 times the others' is 50 times as
large in every linear that takes the gain in, and a rotation smears that, with its rounding error, over all weights. In
bands only channels of about the same gain are mixed, and what their gains have in common stays in the norm.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.rotation import Space
from qe_dist.core.spec import InputGroup
from qe_dist.numerics.hadamard import Orthogonal, Signs, bands_of, online_factors, randomized_hadamard


@dataclass(frozen=True)
class Hadamard:
    """Spreads the outlier channels of a token over all channels."""

    seed: int = 0
    """Seed of the random signs."""
    octaves: float = 0.0
    """Channels are mixed if their norm gains are at most about so many octaves apart. 0: all are mixed (paper)."""
    online: bool = True
    """Whether down's input is rotated at run time. Engines other than ours cannot do that."""
    ranks: int = 8
    """Tensor-parallel ranks that the rotation at run time can be shared out to, whatever the run is made for: it mixes
    blocks of channels that lie on one of so many. Smaller blocks cost less, too."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"rotation.seed must lie in 0..2^31-1, found {self.seed}")
        if not 0 <= self.octaves < float("inf"):
            raise ConfigError(f"rotation.octaves must be at least 0 and finite, found {self.octaves}")
        if self.ranks < 1:
            raise ConfigError(f"rotation.ranks must be at least 1, found {self.ranks}")

    def bases(self, widths: Mapping[Space, int], gains: Float[Tensor, "L N"]) -> dict[Space, Orthogonal]:
        random = torch.Generator().manual_seed(self.seed)
        bands = {space: torch.zeros(width, dtype=torch.int64) for space, width in sorted(widths.items())}
        if self.octaves:
            bands["stream"] = bands_of(gains, self.octaves)
        return {space: randomized_hadamard(b, random) for space, b in bands.items()}

    def at_run_time(self, group: InputGroup, ranks: int) -> Signs:
        """Factors for the input of down, which other linears make channel by channel; none for other groups."""
        width = group.in_features
        if group.linears[0].split == "row":
            width //= math.lcm(*(count for count in (ranks, self.ranks) if width % count == 0))
        return online_factors(width) if self.online and group.producers else ()


METHOD = Hadamard
