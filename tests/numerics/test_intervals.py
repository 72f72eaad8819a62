"""Bootstrap intervals against scipy's, and against how often they hold what they should."""

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from qe_dist.numerics.intervals import FEWEST, interval


@pytest.fixture
def samples(normal):
    tokens = (normal(0, 60).abs() * 50 + 5).round()
    kl = tokens * (0.2 + 0.1 * normal(1, 60)).abs()
    return kl, kl * 0.9 + 0.01 * tokens * normal(2, 60), tokens


def test_intervals_are_those_of_scipy(samples):
    kl, other, tokens = (x.double().numpy() for x in samples)

    def ratio(a, w, axis=-1):
        return a.sum(axis=axis) / w.sum(axis=axis)

    def apart(a, b, w, axis=-1):
        return (a - b).sum(axis=axis) / w.sum(axis=axis)

    options = {"paired": True, "method": "percentile", "n_resamples": 4000, "rng": np.random.default_rng(1)}
    for data, statistic, given in (
        ((kl, tokens), ratio, (samples[0], samples[2])),
        ((kl, other, tokens), apart, (samples[0], samples[2], samples[1])),
    ):
        low, high = bootstrap(data, statistic, **options).confidence_interval
        found = interval(*given)
        assert found == pytest.approx((low, high), abs=0.06 * (high - low))


def test_a_paired_difference_is_sharper_than_two_intervals(samples):
    kl, other, tokens = samples
    mine, theirs, apart = interval(kl, tokens), interval(other, tokens), interval(kl, tokens, other)
    assert apart[1] - apart[0] < 0.5 * (mine[1] - mine[0])
    assert mine[0] < theirs[1]
    assert theirs[0] < mine[1]  # apart from each other they tell nothing
    assert apart[0] > 0


def test_the_mean_of_all_is_within_the_interval_as_often_as_claimed():
    generator = torch.Generator().manual_seed(5)
    hits = 0
    for i in range(200):
        tokens = torch.randint(20, 60, (50,), generator=generator).double()
        found = interval(tokens * (1 + 0.5 * torch.randn(50, generator=generator)), tokens, seed=i)
        hits += found[0] <= 1.0 <= found[1]
    assert 0.89 <= hits / 200 <= 0.99


def test_a_function_of_the_ratio_and_too_few_samples(samples):
    kl, _, tokens = samples
    low, high = interval(kl, tokens)
    wanted = np.exp([low, high])
    assert interval(kl, tokens, measure=torch.exp) == pytest.approx(tuple(wanted), rel=1e-6)
    assert interval(kl[: FEWEST - 1], tokens[: FEWEST - 1]) is None
    assert interval(kl[:FEWEST], tokens[:FEWEST]) is not None
