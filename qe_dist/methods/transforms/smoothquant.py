"""SmoothQuant: s_c = max|x_c|^alpha / max|W_c|^(1 - alpha), x~ = x / s (arXiv 2211.10438)."""

from dataclasses import dataclass

import torch

from qe_dist.core.errors import ConfigError
from qe_dist.methods.base import GroupProblem
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class SmoothQuant:
    """Shares the range between input and weight, channel by channel."""

    alpha: float = 0.5
    """0: the range of the weights moves to the activations. 1: that of the activations to the weights, every channel
    of x~ is as loud (SERQ's static flattening). The paper: 0.5."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"transform.alpha must lie in 0..1, found {self.alpha}")

    def needs(self) -> Needs:
        return Needs()

    def fit(self, problem: GroupProblem) -> GroupProblem:
        peak = problem.stats.abs_max.amax(dim=0)
        weight = torch.stack([w.abs().amax(dim=0) for w in problem.weights.values()]).amax(dim=0)
        scale = peak.clamp_min(1e-5) ** self.alpha / weight.clamp_min(1e-5) ** (1 - self.alpha)
        # A channel that is never used, or that nobody reads, keeps its size.
        return problem.rescaled(torch.where((peak > 0) & (weight > 0), scale, 1.0).float())


METHOD = SmoothQuant
