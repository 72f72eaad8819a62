"""No transform."""

from dataclasses import dataclass

from qe_dist.methods.base import GroupProblem
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class NoTransform:
    """Input and weight as they are."""

    def needs(self) -> Needs:
        return Needs()

    def fit(self, problem: GroupProblem) -> GroupProblem:
        return problem


METHOD = NoTransform
