"""MASQuant's cross-modal compensation: an adapter that only image tokens see (arXiv 2603.04800, Theorem 2).

E_image = S_image W - Q(S_text W) is what the stored weight misses for them: that the weight was smoothed for text, and
its rounding error. The best rank-r repair in the metric of the smoothed image tokens is the paper's L1 L2. Text tokens
get nothing, so decoding costs nothing. With a transform that has one scale, E_image is the rounding error. The input of
`down`, which other linears of the block make, gets nothing either, as in MASQuant's code.

Departure: one adapter for all linears of a group, where MASQuant has one for each.
"""

from dataclasses import dataclass
from typing import ClassVar

from qe_dist.core.batch import IMAGE
from qe_dist.methods.base import Budget, Compensation, Correction, ErrorProblem, Experts
from qe_dist.numerics.lowrank import gram_product, low_rank, low_rank_floats
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class CrossModal(Compensation):
    """One whitened low-rank adapter for image tokens."""

    by_modality: ClassVar[bool] = True

    def needs(self) -> Needs:
        return Needs(gram=True, images=True)

    def fit(self, problem: ErrorProblem) -> Correction:
        stats = problem.stats
        if stats.gram is None or stats.count[IMAGE] == 0 or problem.problem.group.producers:  # count: all had a NaN
            return Correction()
        error = problem.error_of(IMAGE)
        up, down = low_rank(error, gram_product(stats.gram[IMAGE].to(error.dtype)), problem.rank)
        return Correction(experts=Experts(up[None], down[None]))

    def most_bytes(self, outputs: int, width: int, router_width: int, budget: Budget) -> int:
        return budget.pair_bytes(outputs, width)

    def working_floats(self, outputs: int, width: int, sample_tokens: int, budget: Budget) -> int:
        rank = budget.rank_for(outputs, width)
        return max(4 * outputs * width, low_rank_floats(outputs, width, rank))  # first of these: to make the error


METHOD = CrossModal
