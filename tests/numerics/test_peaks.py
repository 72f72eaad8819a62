"""Lists of channels that stretch the grids of tokens, against every list there is."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from qe_dist.numerics.peaks import stretching_channels

WIDTH = 11


def left(x: Tensor, channels: Sequence[int]) -> float:
    """Mean over tokens of the largest square that is left; slow and in float64."""
    rest = [c for c in range(x.shape[1]) if c not in channels]
    return sum(max(float(token[c]) ** 2 for c in rest) for token in x.double()) / len(x)


def best(x: Tensor, count: int) -> float:
    return min(left(x, some) for some in itertools.combinations(range(x.shape[1]), count))


@pytest.fixture(params=range(6))
def tokens(request: pytest.FixtureRequest, normal: Callable[..., Tensor]) -> Tensor:
    """Channels of very different size, and tokens as well."""
    seed = request.param
    return normal(seed, 30, WIDTH) * normal(100 + seed, WIDTH).exp() * normal(200 + seed, 30, 1).exp()


def test_one_channel_is_the_best_one(tokens: Tensor) -> None:
    assert left(tokens, stretching_channels(tokens, 1).tolist()) == pytest.approx(best(tokens, 1))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_list_is_nearly_the_best_one(tokens: Tensor, count: int) -> None:
    channels = stretching_channels(tokens, count).tolist()
    assert len(set(channels)) == count
    assert left(tokens, channels) <= 1.05 * best(tokens, count)


def test_a_longer_list_begins_as_a_shorter_one(tokens: Tensor) -> None:
    assert torch.equal(stretching_channels(tokens, 5)[:3], stretching_channels(tokens, 3))


def test_a_channel_that_is_never_the_largest_comes_by_its_energy() -> None:
    x = torch.tensor([[9.0, 1.0, 2.0, 0.0], [9.0, 1.0, 2.0, 0.0]])
    assert stretching_channels(x, 4).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("x", [torch.zeros(3, WIDTH), torch.ones(3, WIDTH), torch.ones(0, WIDTH)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 4, WIDTH, 2 * WIDTH])
def test_lists_hold_distinct_channels_whatever_the_tokens(x: Tensor, count: int) -> None:
    channels = stretching_channels(x, count)
    assert channels.dtype == torch.int64
    assert len(set(channels.tolist())) == len(channels) == min(count, WIDTH)
