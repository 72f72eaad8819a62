"""No compensation."""

from dataclasses import dataclass
from typing import ClassVar

from qe_dist.methods.base import Budget, Compensation, Correction, ErrorProblem
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class NoCompensation(Compensation):
    """The rounding error stays."""

    tunable: ClassVar[bool] = True

    def needs(self) -> Needs:
        return Needs()

    def fit(self, problem: ErrorProblem) -> Correction:
        return Correction()

    def most_bytes(self, outputs: int, width: int, router_width: int, budget: Budget) -> int:
        return 0

    def working_floats(self, outputs: int, width: int, sample_tokens: int, budget: Budget) -> int:
        return 0


METHOD = NoCompensation
