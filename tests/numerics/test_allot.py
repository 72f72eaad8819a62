"""A budget goes where it takes most off the error."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from qe_dist.numerics.allot import allot

GAINS = st.lists(st.floats(0.0, 10.0, allow_subnormal=False), max_size=4)


@given(gains=st.lists(GAINS, min_size=1, max_size=3), cost=st.floats(0.5, 4.0), budget=st.floats(0.0, 12.0))
def test_equal_costs_give_the_best_of_all_choices(gains: list[list[float]], cost: float, budget: float) -> None:
    gains = [sorted(g, reverse=True) for g in gains]
    ranks = allot([torch.tensor(g, dtype=torch.float64) for g in gains], [cost] * len(gains), budget)
    taken = sum(sum(g[:r]) for g, r in zip(gains, ranks, strict=True))
    assert sum(ranks) * cost <= budget * (1 + 1e-12)
    choices = itertools.product(*(range(len(g) + 1) for g in gains))
    affordable = (c for c in choices if sum(c) * cost <= budget * (1 + 1e-12))
    best = max(sum(sum(g[:r]) for g, r in zip(gains, c, strict=True)) for c in affordable)
    assert taken >= best - 1e-9 - max((g[0] for g in gains if g), default=0.0) * 1e-9


def test_what_is_cheap_for_its_gain_goes_first() -> None:
    assert allot([torch.tensor([4.0, 1.0]), torch.tensor([3.0, 2.9])], [4.0, 1.0], 6.0) == [1, 2]


def test_nothing_is_spent_on_directions_without_gain() -> None:
    assert allot([torch.tensor([1.0, 0.0, 0.0])], [1.0], 10.0) == [1]
    assert allot([], [], 1.0) == []


def test_spending_stops_at_the_first_that_does_not_fit() -> None:
    """So a little more budget never takes a direction away again."""
    assert allot([torch.tensor([8.0]), torch.tensor([1.0])], [4.0, 1.0], 3.0) == [0, 0]
