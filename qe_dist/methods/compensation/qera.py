"""QERA-exact: one low-rank adapter, optimal for the inputs seen (arXiv 2410.06040).

L = U_r (U_r^T E), U_r the top eigenvectors of E G E^T; the same L as ASER's Cholesky-whitened SVD.
"""

from dataclasses import dataclass

from torch import Tensor

from qe_dist.methods.base import NO_COLUMNS, Correction, ErrorProblem, GroupProblem
from qe_dist.numerics.lowrank import gram_product, low_rank
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class QERA:
    """One whitened low-rank adapter for every token."""

    def needs(self) -> Needs:
        return Needs(gram=True)

    def exempt(self, problem: GroupProblem) -> Tensor:
        return NO_COLUMNS

    def fit(self, problem: ErrorProblem) -> Correction:
        error = problem.stacked
        gram = problem.stats.total_gram.to(error.dtype)
        up, down = low_rank(error, gram_product(gram), problem.rank)
        return Correction(shared_up=up, shared_down=down)


METHOD = QERA
