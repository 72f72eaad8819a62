"""LQER and L2QER: one low-rank adapter by the SVD of the (scaled) error (arXiv 2402.02446).

L = [E S]_r S^-1 with S = I (LQER), or S = diag(a), a = mean|x| of each channel (L2QER).

Departures. The paper's a is the largest of the batches' means of |x|; our statistics have the mean over all
tokens [INF]. The paper divides a by sqrt(min a * max a); a common factor of S leaves L as it is, so we do not.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from qe_dist.methods.base import Budget, Compensation, Correction, ErrorProblem, LowRank
from qe_dist.numerics.factors import adapter
from qe_dist.numerics.lowrank import diagonal_product, low_rank_floats
from qe_dist.numerics.stats import Needs

SMALLEST = 1e-4
"""The least mean|x| (code of the paper), so that a channel that is never used still counts a little."""


@dataclass(frozen=True)
class LQER(Compensation):
    """One low-rank adapter for every token, weighted at most by channel sizes; needs no Gram matrix."""

    tunable: ClassVar[bool] = True

    metric: Literal["identity", "mean_abs"] = "mean_abs"
    """identity: LQER, the plain SVD of the error. mean_abs: L2QER."""

    def needs(self) -> Needs:
        return Needs()

    def fit(self, problem: ErrorProblem) -> Correction:
        error, size = problem.stacked, problem.stats.mean_abs.clamp_min(SMALLEST)
        scale = torch.ones_like(size) if self.metric == "identity" else size
        pair = adapter(error, diagonal_product(scale.to(error).square()), problem.rank, problem.budget.factor_bits)
        return Correction(shared=LowRank(*pair))

    def most_bytes(self, outputs: int, width: int, router_width: int, budget: Budget) -> int:
        return budget.pair_bytes(outputs, width)

    def working_floats(self, outputs: int, width: int, sample_tokens: int, budget: Budget) -> int:
        return low_rank_floats(outputs, width, budget.rank_for(outputs, width))


METHOD = LQER
