"""No lists of channels."""

from dataclasses import dataclass

from qe_dist.methods.base import NO_COLUMNS, GroupProblem, Lists
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class NoLists:
    """Every channel is on the activation grid."""

    def needs(self) -> Needs:
        return Needs()

    def bits_per_weight(self) -> float:
        return 0.0

    def choose(self, problem: GroupProblem) -> Lists:
        return Lists(NO_COLUMNS)


METHOD = NoLists
