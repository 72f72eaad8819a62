"""Divides a budget among several low-rank adapters: the next rank goes where it removes most error per bit."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def allot(gains: Sequence[Float[Tensor, " _"]], costs: Sequence[float], budget: float) -> list[int]:
    """The rank of each adapter.

    gains: the error that each further rank removes, in descending order. costs: the cost of one rank of each adapter,
    in the unit of the budget. Taking the best gain per cost first is optimal, but for the last direction that
    does not fit any more: each adapter's directions are taken in their order because their gains descend.
    """
    pairs = enumerate(zip(gains, costs, strict=True))
    rates = [(gain / cost, i) for i, (own, cost) in pairs for gain in own.tolist()]
    ranks = [0] * len(gains)
    for rate, i in sorted(rates, key=lambda one: -one[0]):
        if rate <= 0 or costs[i] > budget:
            break
        ranks[i] += 1
        budget -= costs[i]
    return ranks
