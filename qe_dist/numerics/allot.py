"""Where a budget does most good: ranks for several adapters by marginal error per bit."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def allot(gains: Sequence[Float[Tensor, " _"]], costs: Sequence[float], budget: float) -> list[int]:
    """How many of its directions each adapter gets.

    gains: what each further direction takes off the error, in descending order. costs: of one direction of each
    adapter, in the unit of the budget. Taking the best gain per cost first is optimal, but for the last direction that
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
