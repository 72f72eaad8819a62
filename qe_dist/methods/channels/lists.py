"""A list of channels for each input group that leaves the activation grid and is carried in 16 bits.

A few channels are the largest of nearly every token, and the token's grid must reach them
(docs/how/methods.md). LLM.int8() (arXiv 2208.07339) takes such channels out as they come; a list
that is fixed after calibration costs no search at run time, and its weights are stored in 16 bits alone: codes 0 there,
nothing to round, nothing to repair. It pays where only weights are rounded, too: what the largest inputs meet is exact.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.methods.base import GroupProblem
from qe_dist.numerics.peaks import stretching_channels

MOST = 0.02
"""More is not a list any more: the 16-bit columns are read and multiplied for every token."""


@dataclass(frozen=True)
class ChannelLists:
    """The channels without which the largest |x_c| of a token falls most, relative to the token."""

    share: float = 0.01
    """Share of the input channels of each group, one at least; each percent takes 0.16 bits per weight."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= MOST:
            raise ConfigError(f"channels.share must be more than 0 and at most {MOST}, found {self.share}")

    def check(self, recipe: Any) -> None:
        members = recipe.describe()
        if members["transform"]["name"] == "masquant":
            raise ConfigError(
                "channels lists and transform masquant clash: columns are the same for text and images, and the scales "
                "are not; choose another transform"
            )
        if members["compensation"].get("extract"):
            raise ConfigError(
                "channels lists and compensation quant_experts with extract = true both extract channels; leave one out"
            )

    def bits_per_weight(self) -> float:
        return 16 * self.share

    def choose(self, problem: GroupProblem) -> Int[Tensor, " C"]:
        x = problem.stats.sample.x.float()
        size = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        count = max(1, math.floor(self.share * x.shape[1]))
        return stretching_channels(x / size, count)


METHOD = ChannelLists
