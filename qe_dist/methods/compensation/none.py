"""No compensation."""

from dataclasses import dataclass

from torch import Tensor

from qe_dist.methods.base import NO_COLUMNS, Correction, ErrorProblem, GroupProblem
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class NoCompensation:
    """The rounding error stays."""

    def needs(self) -> Needs:
        return Needs()

    def exempt(self, problem: GroupProblem) -> Tensor:
        return NO_COLUMNS

    def fit(self, problem: ErrorProblem) -> Correction:
        return Correction()


METHOD = NoCompensation
