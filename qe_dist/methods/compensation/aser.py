"""ASER: outlier columns exempted from rounding and one whitened low-rank adapter (arXiv 2411.07762).

Quant Experts without its routed half: the strongest rival of the same active rank. With rank_by = "frequency" the two
differ in nothing but the experts. Under a byte budget no more columns are exempted than the ranks that it buys, and
none where exempting leaves more of the error (`Recipe`).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.methods.base import Budget, Compensation, Correction, ErrorProblem, GroupProblem, LowRank
from qe_dist.numerics.affinity import RankBy, outlier_channels
from qe_dist.numerics.factors import adapter
from qe_dist.numerics.lowrank import gram_product, low_rank_floats
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class ASER(Compensation):
    """One adapter for every token that also carries the outlier columns."""

    tunable: ClassVar[bool] = True

    k: int = 32
    """Number of outlier columns (the paper's: 32)."""
    rank_by: RankBy = "mean"
    """mean: outliers have the largest mean|x| * mean|W| (paper). frequency: they are most often among the k most
    important channels of a token, as in Quant Experts. Give outlier_smoothing the same."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"compensation.k must be at least 1, found {self.k}")

    def needs(self) -> Needs:
        return Needs(gram=True, top_channels=frozenset({self.k} if self.rank_by == "frequency" else ()))

    def exempt(self, problem: GroupProblem) -> Tensor:
        return outlier_channels(problem.stats, self.rank_by, self.k)

    def fit(self, problem: ErrorProblem) -> Correction:
        error = problem.stacked
        gram = problem.stats.total_gram.to(error.dtype)
        pair = adapter(error, gram_product(gram), problem.rank, problem.budget.factor_bits)
        return Correction(shared=LowRank(*pair))

    def most_bytes(self, outputs: int, width: int, router_width: int, budget: Budget) -> int:
        return budget.pair_bytes(outputs, width)

    def working_floats(self, outputs: int, width: int, sample_tokens: int, budget: Budget) -> int:
        return width * width + low_rank_floats(outputs, width, budget.rank_for(outputs, width))


METHOD = ASER
