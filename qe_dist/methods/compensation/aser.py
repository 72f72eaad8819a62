"""ASER: outlier columns exempted from rounding and one whitened low-rank adapter (arXiv 2411.07762).

Quant Experts without its routed half: the strongest rival of the same active rank. Which columns are
outliers is taken from their frequency among the important channels, as in Quant Experts, so that the two
differ in nothing but the experts; ASER ranks them by mean|x| * mean|W|.
"""

from dataclasses import dataclass

from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.methods.base import Correction, ErrorProblem, GroupProblem
from qe_dist.numerics.affinity import split_channels
from qe_dist.numerics.lowrank import capped, gram_product, low_rank
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class ASER:
    """One adapter for every token that also carries the outlier columns."""

    k: int = 32
    """Outlier columns (paper)."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"compensation.k must be at least 1, found {self.k}")

    def needs(self) -> Needs:
        return Needs(gram=True, top_channels=frozenset({self.k}))

    def exempt(self, problem: GroupProblem) -> Tensor:
        return split_channels(problem.stats.frequency(self.k), capped(problem.group.in_features, self.k), 0)[0]

    def fit(self, problem: ErrorProblem) -> Correction:
        error = problem.stacked
        gram = problem.stats.total_gram.to(error.dtype)
        up, down = low_rank(error, gram_product(gram), problem.rank)
        return Correction(shared_up=up, shared_down=down)


METHOD = ASER
