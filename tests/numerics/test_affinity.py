"""Co-occurrence, NPMI and clusters of channels, by hand and on planted structure."""

from collections.abc import Callable
from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits
from torch import Tensor

from qe_dist.numerics.affinity import assign_tokens, cluster_channels, npmi, split_channels, top_channels

Normal = Callable[..., Tensor]


def occurrence(*rows: str) -> Tensor:
    """One string per channel, one character per token, x where the channel is important."""
    return torch.tensor([[mark == "x" for mark in row] for row in rows]).T


def test_npmi_by_hand() -> None:
    """Of eight tokens. 0 and 1: always together. 0 and 2: never. 3 is in three tokens, two of them with 0."""
    occurs = occurrence(
        "xxxx....",
        "xxxx....",
        "....xxxx",
        "xx..x...",
    )
    near = log((2 / 8) / (4 / 8 * 3 / 8)) / -log(2 / 8)
    far = log((1 / 8) / (4 / 8 * 3 / 8)) / -log(1 / 8)
    wanted = torch.tensor(
        [
            [1.0, 1.0, -1.0, near],
            [1.0, 1.0, -1.0, near],
            [-1.0, -1.0, 1.0, far],
            [near, near, far, 1.0],
        ],
        dtype=torch.float64,
    )
    assert torch.allclose(npmi(occurs), wanted, atol=1e-12)


def test_independent_channels_have_npmi_zero() -> None:
    assert npmi(occurrence("xx..", "x.x."))[0, 1].abs() < 1e-12


def test_channels_in_every_token_tell_nothing_but_of_each_other() -> None:
    value = npmi(occurrence("xxxx", "xxxx", "x..x"))
    assert value[0, 1] == 1
    assert value[0, 2] == 0


def test_a_channel_that_never_occurs_is_far_from_all_others() -> None:
    value = npmi(occurrence("....", "xx..", "...."))
    assert value.tolist() == [[1, -1, -1], [-1, 1, -1], [-1, -1, 1]]


@given(st.integers(0, 10_000), st.integers(0, 12), st.integers(1, 6), st.floats(0.05, 0.95))
def test_npmi_is_symmetric_and_within_its_limits(seed: int, tokens: int, channels: int, density: float) -> None:
    random = torch.Generator().manual_seed(seed)
    value = npmi(torch.rand(tokens, channels, generator=random) < density)
    assert torch.isfinite(value).all()
    assert torch.equal(value, value.T)
    assert value.abs().max() <= 1
    assert (value.diagonal() == 1).all()


@pytest.fixture
def planted() -> tuple[Tensor, Tensor, Tensor]:
    """(occurs, cluster of each channel, cluster of each token): 4 clusters of 8 channels in a shuffled order.

    A token has each channel of its own cluster with probability 0.7, and any other with 0.05.
    """
    random = torch.Generator().manual_seed(0)
    of_channel = torch.arange(32)[torch.randperm(32, generator=random)] % 4
    of_token = torch.randint(4, (400,), generator=random)
    chance = torch.where(of_token[:, None] == of_channel, 0.7, 0.05)
    return torch.rand(400, 32, generator=random) < chance, of_channel, of_token


def test_planted_clusters_are_found(planted: tuple[Tensor, Tensor, Tensor]) -> None:
    occurs, of_channel, _ = planted
    labels = cluster_channels(occurs, 4, seed=0)
    pairs = set(zip(labels.tolist(), of_channel.tolist(), strict=True))
    assert len(pairs) == 4  # the same clusters under other names
    assert {label for label, _ in pairs} == {0, 1, 2, 3}


def test_clusters_depend_on_the_seed_only(planted: tuple[Tensor, Tensor, Tensor]) -> None:
    occurs, _, _ = planted
    noise = occurs[:, torch.randperm(32, generator=torch.Generator().manual_seed(1))][:50]
    assert torch.equal(cluster_channels(noise, 6, seed=3), cluster_channels(noise, 6, seed=3))


def test_clusters_do_not_depend_on_the_number_of_threads() -> None:
    """Channels that are all alike are told apart by nothing but the last bits of a sum."""
    alike = torch.ones(3, 256, dtype=torch.bool)
    with threadpool_limits(2):
        labels = cluster_channels(alike, 8, seed=0)
    with threadpool_limits(1):
        assert torch.equal(cluster_channels(alike, 8, seed=0), labels)


@pytest.mark.parametrize("channels", [0, 1, 4])
def test_as_many_channels_as_clusters_or_fewer_stay_alone(channels: int) -> None:
    occurs = torch.ones(5, channels, dtype=torch.bool)
    assert cluster_channels(occurs, 4, seed=0).tolist() == list(range(channels))


def test_channels_that_never_differ_still_get_a_label() -> None:
    """One token, or tokens that are all alike: any clusters will do, without a warning on the terminal."""
    labels = cluster_channels(torch.ones(3, 9, dtype=torch.bool), 4, seed=0)
    assert labels.shape == (9,)
    assert labels.min() >= 0
    assert labels.max() < 4


def test_clusters_that_never_meet_are_found() -> None:
    """The graph of their affinities is then in pieces."""
    occurs = torch.block_diag(*[torch.ones(6, 3)] * 4).bool()
    labels = cluster_channels(occurs, 4, seed=0)
    assert len({tuple(part.tolist()) for part in labels.view(4, 3)}) == 4
    assert all(part.unique().numel() == 1 for part in labels.view(4, 3))


def test_a_token_belongs_where_most_of_its_channels_are() -> None:
    labels = torch.tensor([0, 0, 0, 2, 2, 1])
    occurs = torch.tensor(
        [
            [1, 0, 0, 1, 1, 0],  # one of 0, two of 2
            [1, 1, 0, 1, 0, 1],  # two of 0
            [0, 0, 0, 1, 0, 1],  # one of 2, one of 1: a tie goes to the lower
            [0, 0, 0, 0, 0, 0],  # none
        ]
    ).bool()
    assert assign_tokens(occurs, labels, 4).tolist() == [2, 0, 1, -1]


def test_without_channels_no_token_belongs_anywhere() -> None:
    nothing = torch.zeros(3, 0, dtype=torch.bool)
    assert assign_tokens(nothing, torch.zeros(0, dtype=torch.int64), 4).tolist() == [-1, -1, -1]


def test_tokens_of_planted_clusters_find_home(planted: tuple[Tensor, Tensor, Tensor]) -> None:
    occurs, of_channel, of_token = planted
    found = assign_tokens(occurs, of_channel, 4)
    assert (found == of_token).double().mean() > 0.98  # noise may outvote a token with few channels


def test_split_ranks_channels_by_frequency() -> None:
    shared, routed = split_channels(torch.tensor([0.1, 0.9, 0.5, 0.5, 0.0, 0.7]), 2, 3)
    assert shared.tolist() == [1, 5]
    assert routed.tolist() == [2, 3, 0]  # of equals the lower first


def test_split_gives_what_there_is() -> None:
    shared, routed = split_channels(torch.tensor([0.1, 0.9, 0.5]), 2, 16)
    assert (shared.tolist(), routed.tolist()) == ([1, 2], [0])


def test_top_channels_against_a_loop(normal: Normal) -> None:
    x, importance = normal(0, 20, 10), normal(1, 10).abs()
    marked = top_channels(x, importance, 3)
    for token, row in zip(x.double(), marked, strict=True):
        scores = {c: abs(float(v)) * float(importance[c]) for c, v in enumerate(token)}
        assert set(row.nonzero().flatten().tolist()) == set(sorted(scores, key=scores.get)[-3:])


def test_no_more_top_channels_than_channels(normal: Normal) -> None:
    assert top_channels(normal(2, 5, 4), torch.ones(4), 9).all()
