"""QERA: one low-rank adapter, optimal for the inputs seen (arXiv 2410.06040).

exact: L = U_r (U_r^T E), U_r the top eigenvectors of E G E^T; the same L as ASER's Cholesky-whitened SVD.
diagonal: L = [E S]_r S^-1 with S = diag(sqrt E[x^2]), QERA-approx: optimal if channels are uncorrelated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from qe_dist.methods.base import SPREAD, Budget, Compensation, Correction, ErrorProblem, LowRank
from qe_dist.numerics.factors import adapter
from qe_dist.numerics.lowrank import diagonal_product, gram_product, low_rank, low_rank_floats
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class QERA(Compensation):
    """One whitened low-rank adapter for every token."""

    tunable: ClassVar[bool] = True

    metric: Literal["exact", "diagonal"] = "exact"
    """exact: by the Gram matrix of the inputs. diagonal: by its diagonal alone (QERA-approx)."""

    def needs(self) -> Needs:
        return Needs(gram=True)

    def gains(self, problem: ErrorProblem) -> Float[Tensor, " R"]:
        _, down = low_rank(problem.stacked, self._metric(problem), problem.most_rank)
        return problem.gains(down)

    def fit(self, problem: ErrorProblem) -> Correction:
        pair = adapter(problem.stacked, self._metric(problem), problem.rank, problem.budget.factor_bits)
        return Correction(shared=LowRank(*pair))

    def most_bytes(self, outputs: int, width: int, router_width: int, budget: Budget) -> int:
        return budget.pair_bytes(outputs, width)

    def working_floats(self, outputs: int, width: int, sample_tokens: int, budget: Budget) -> int:
        rank = budget.rank_for(outputs, width)
        granted = rank if budget.extra_bits is None else min(SPREAD * rank, outputs, width)
        return width * width + low_rank_floats(outputs, width, granted)

    def _metric(self, problem: ErrorProblem) -> Callable[[Tensor], Tensor]:
        gram = problem.stats.total_gram.to(problem.dtype)
        return gram_product(gram) if self.metric == "exact" else diagonal_product(gram.diagonal())


METHOD = QERA
