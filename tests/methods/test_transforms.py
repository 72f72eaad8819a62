"""The scales of each transform against its formula, one channel at a time in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import GroupProblem
from qe_dist.methods.compensation.none import NoCompensation
from qe_dist.methods.quantizers.rtn import RoundToNearest
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.transforms.outlier_smoothing import OutlierSmoothing
from qe_dist.methods.transforms.smoothquant import SmoothQuant
from qe_dist.numerics.affinity import RankBy

WIDTH = 96
BF16 = 2.0**-8

Build = Callable[..., GroupProblem]


@pytest.fixture
def x(planted: Callable[..., Any]) -> Tensor:
    return planted(300, WIDTH).x


@pytest.fixture
def problem_of(problem_for: Build) -> Callable[..., GroupProblem]:
    def build(transform: Any, x: Tensor) -> GroupProblem:
        return problem_for(Recipe(Scheme(4, 6), transform, RoundToNearest(), NoCompensation()), x)

    return build


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant(problem_of: Build, x: Tensor, alpha: float) -> None:
    transform = SmoothQuant(alpha)
    problem = problem_of(transform, x)
    scale = transform.fit(problem).input_scale[0].double()
    weight = torch.cat(list(problem.weights.values())).double()
    for channel in range(WIDTH):
        wanted = x[:, channel].abs().max().double() ** alpha / weight[:, channel].abs().max() ** (1 - alpha)
        assert scale[channel] == pytest.approx(float(wanted), rel=BF16)


def test_smoothquant_leaves_channels_alone_that_are_never_used(problem_of: Build, x: Tensor) -> None:
    silent = x.index_fill(1, torch.tensor([7]), 0.0)
    assert SmoothQuant().fit(problem_of(SmoothQuant(), silent)).input_scale[0, 7] == 1


@pytest.mark.parametrize("rank_by", ["frequency", "mean"])
def test_outlier_smoothing(problem_of: Build, x: Tensor, rank_by: RankBy) -> None:
    """The channels that matter most shrink to the mean size of the smallest of them."""
    transform = OutlierSmoothing(k=64, rank_by=rank_by)  # 64 of 1536 channels is 4 of 96
    problem = problem_of(transform, x)
    scale = transform.fit(problem).input_scale[0].double()
    mean = x.double().abs().mean(dim=0)
    weight = torch.cat(list(problem.weights.values())).double().abs().mean(dim=0)
    score = problem.stats.frequency(64) if rank_by == "frequency" else mean * weight
    outliers = sorted(range(WIDTH), key=lambda c: -float(score[c]))[:4]
    for channel in range(WIDTH):
        wanted = float(mean[channel] / mean[outliers].min()) if channel in outliers else 1.0
        assert scale[channel] == pytest.approx(wanted, rel=BF16)


def test_smoothed_outliers_are_of_one_size(problem_of: Build, x: Tensor) -> None:
    transform = OutlierSmoothing(k=64)
    moved = transform.fit(problem_of(transform, x))
    often = (moved.input_scale[0] > 1).nonzero().flatten()
    assert often.numel() == 3  # the fourth is the smallest, which stays
    mean = moved.stats.mean_abs[often]
    assert mean.max() < mean.min() * (1 + 3 * BF16)


def test_outlier_smoothing_is_bounded(problem_of: Build, x: Tensor) -> None:
    """A silent channel among the most important ones must not blow up the others."""
    silent = torch.zeros_like(x)
    silent[:, 3] = x[:, 3]
    scale = OutlierSmoothing(k=64).fit(problem_of(OutlierSmoothing(k=64), silent)).input_scale
    assert torch.isfinite(scale).all()
    assert scale.max() <= 1e4 * (1 + BF16)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_smoothquant_refuses_what_is_no_share(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"transform\.alpha"):
        SmoothQuant(alpha)


def test_outlier_smoothing_needs_a_channel() -> None:
    with pytest.raises(ConfigError, match=r"transform\.k"):
        OutlierSmoothing(k=0)
