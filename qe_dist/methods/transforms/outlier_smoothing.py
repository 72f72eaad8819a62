"""Quant Experts' channel-wise scaling: ASER's formula on the token-independent channels C_s.

m_c = mean|x_c| / min over C_s of mean|x_c| for c in C_s, else 1; x~ = x / m, W~ = W diag(m)
(methods.md section 1.5, step 3). The activation grid no longer has to reach the outliers.
"""

from dataclasses import dataclass

import torch

from qe_dist.core.errors import ConfigError
from qe_dist.methods.base import GroupProblem
from qe_dist.numerics.affinity import split_channels
from qe_dist.numerics.lowrank import capped
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class OutlierSmoothing:
    """Shrinks the channels that matter for every token to the size of the smallest of them."""

    k: int = 32
    """Channels; QE and ASER: 32."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"transform.k must be at least 1, found {self.k}")

    def needs(self) -> Needs:
        return Needs(top_channels=frozenset({self.k}))

    def fit(self, problem: GroupProblem) -> GroupProblem:
        stats = problem.stats
        frequent, _ = split_channels(stats.frequency(self.k), capped(problem.group.in_features, self.k), 0)
        mean = stats.mean_abs
        tiny = torch.finfo(torch.float32).tiny
        factor = (mean[frequent] / mean[frequent].min().clamp_min(tiny)).clamp(1.0, 1e4)
        return problem.rescaled(torch.ones_like(mean).index_copy(0, frequent, factor))


METHOD = OutlierSmoothing
