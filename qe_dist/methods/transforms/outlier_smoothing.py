"""Outlier smoothing of ASER and of Quant Experts: one formula on the channels C_s that matter most.

m_c = mean|x_c| / min over C_s of mean|x_c| for c in C_s, else 1; x~ = x / m, W~ = W diag(m)
(methods.md sections 4.3 and 1.5, step 3). The activation grid no longer has to reach the outliers.
"""

from dataclasses import dataclass

import torch

from qe_dist.core.errors import ConfigError
from qe_dist.methods.base import GroupProblem
from qe_dist.numerics.affinity import RankBy, outlier_channels
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class OutlierSmoothing:
    """Shrinks the channels that matter most to the size of the smallest of them."""

    k: int = 32
    """Number of channels C_s; QE and ASER: 32."""
    rank_by: RankBy = "frequency"
    """frequency: C_s are most often among the k most important channels of a token (Quant Experts). mean: they have
    the largest mean|x| * mean|W| (ASER)."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"transform.k must be at least 1, found {self.k}")

    def needs(self) -> Needs:
        return Needs(top_channels=frozenset({self.k} if self.rank_by == "frequency" else ()))

    def fit(self, problem: GroupProblem) -> GroupProblem:
        stats = problem.stats
        outliers = outlier_channels(stats, self.rank_by, self.k)
        mean = stats.mean_abs
        tiny = torch.finfo(torch.float32).tiny
        factor = (mean[outliers] / mean[outliers].min().clamp_min(tiny)).clamp(1.0, 1e4)
        return problem.rescaled(torch.ones_like(mean).index_copy(0, outliers, factor))


METHOD = OutlierSmoothing
