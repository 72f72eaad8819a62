"""Randomized Hadamard rotation of residual stream and attention heads, as far as it can be fused offline.

QuaRot (arXiv 2404.00456, section 4; methods.md section 6): the norms' gains move into the linears behind them, the
stream is rotated in every tensor that writes or reads it (also the vision merger's output), and the values of each head
between v and o. One head's matrix serves all heads and blocks, so heads that share a key and value stay together.

Departures: no online Hadamards, so the inputs of down (SwiGLU multiplies channel by channel) and q and k (RoPE turns
pairs of channels) stay as they are. The head's matrix has random signs too [INF]. Embeddings, head and merger are
rotated in float64 and stored in the source's dtype. Bands are ours: a channel whose gain is 50 times the others' is 50
times as large in every linear that takes the gain in, and a rotation would smear that, with its rounding error, over
all weights. So only channels of about the same gain are mixed, and what their gains have in common stays in the norm.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.rotation import Space
from qe_dist.numerics.hadamard import Orthogonal, bands_of, randomized_hadamard


@dataclass(frozen=True)
class Hadamard:
    """Spreads the outlier channels of a token over all channels."""

    seed: int = 0
    """Of the random signs."""
    octaves: float = 2.0
    """How far the norm gains of channels that are mixed may be apart. 0: any, as in the paper."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"rotation.seed must lie in 0..2^31-1, found {self.seed}")
        if not 0 <= self.octaves < float("inf"):
            raise ConfigError(f"rotation.octaves must be at least 0 and finite, found {self.octaves}")

    def bases(self, widths: Mapping[Space, int], gains: Float[Tensor, "L N"]) -> dict[Space, Orthogonal]:
        random = torch.Generator().manual_seed(self.seed)
        bands = {space: torch.zeros(width, dtype=torch.int64) for space, width in sorted(widths.items())}
        if self.octaves:
            bands["stream"] = bands_of(gains, self.octaves)
        return {space: randomized_hadamard(b, random) for space, b in bands.items()}


METHOD = Hadamard
