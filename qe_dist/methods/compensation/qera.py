"""QERA: one low-rank adapter, optimal for the inputs seen (arXiv 2410.06040).

exact: L = U_r (U_r^T E), U_r the top eigenvectors of E G E^T; the same L as ASER's Cholesky-whitened SVD.
diagonal: L = [E S]_r S^-1 with S = diag(sqrt E[x^2]), QERA-approx: optimal if channels are uncorrelated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from qe_dist.methods.base import NO_COLUMNS, Correction, ErrorProblem, GroupProblem
from qe_dist.numerics.factors import adapter
from qe_dist.numerics.lowrank import diagonal_product, gram_product, low_rank
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class QERA:
    """One whitened low-rank adapter for every token."""

    metric: Literal["exact", "diagonal"] = "exact"
    """exact: by the Gram matrix of the inputs. diagonal: by its diagonal alone (QERA-approx)."""

    def needs(self) -> Needs:
        return Needs(gram=True)

    def exempt(self, problem: GroupProblem) -> Tensor:
        return NO_COLUMNS

    def gains(self, problem: ErrorProblem) -> Float[Tensor, " R"]:
        _, down = low_rank(problem.stacked, self._metric(problem), problem.most_rank)
        return problem.gains(down)

    def fit(self, problem: ErrorProblem) -> Correction:
        up, down = adapter(problem.stacked, self._metric(problem), problem.rank, problem.budget.factor_bits)
        return Correction(shared_up=up, shared_down=down)

    def _metric(self, problem: ErrorProblem) -> Callable[[Tensor], Tensor]:
        gram = problem.stats.total_gram.to(problem.dtype)
        return gram_product(gram) if self.metric == "exact" else diagonal_product(gram.diagonal())


METHOD = QERA
