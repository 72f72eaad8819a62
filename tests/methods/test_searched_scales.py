"""AWQ and MBQ against a search written out in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qe_dist.core.batch import IMAGE, TEXT
from qe_dist.core.errors import ConfigError, NumericalError
from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import GroupProblem
from qe_dist.methods.compensation.none import NoCompensation
from qe_dist.methods.quantizers.rtn import RoundToNearest
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.recipes import recipe_from
from qe_dist.methods.transforms.awq import AWQ
from qe_dist.methods.transforms.mbq import MBQ
from qe_dist.numerics.scale_search import ScaleSearch, rounded_output
from qe_dist.numerics.stats import TokenSample

WIDTH, TOKENS = 96, 300
SCHEMES = ["w4a4", "w4a6", "w3a16", "w4a16g32"]


@pytest.fixture(scope="module")
def problem_of(planted: Callable[..., Any], problem_for: Callable[..., GroupProblem]) -> Callable[..., GroupProblem]:
    x = planted(TOKENS, WIDTH).x

    def build(transform: Any, scheme: str = "w4a4") -> GroupProblem:
        return problem_for(Recipe(Scheme.parse(scheme), transform, RoundToNearest(), NoCompensation()), x)

    return build


def losses(problem: GroupProblem, by: str, power: int, image_weight: float, grid: int, tokens: int) -> list[float]:
    """Of every exponent: sum over tokens of their weight times the mean |output error|^power."""
    x = problem.stats.sample.x[:tokens].double()
    seen = problem.stats.sample.x.double().abs()
    size = seen.mean(dim=0) if by == "mean" else seen.amax(dim=0)
    weight = torch.cat([w.double() for w in problem.weights.values()])
    share = torch.where(problem.stats.sample.modality[:tokens] == IMAGE, image_weight, 1.0).double()
    bits, act_bits, group = problem.scheme.weight_bits, problem.scheme.act_bits, problem.scheme.group_size or WIDTH
    found = []
    for step in range(grid):
        scale = size ** (step / grid)
        scale = (scale / (scale.max() * scale.min()).sqrt()).bfloat16().double()
        parts = (weight * scale).view(len(weight), -1, group)
        steps = (parts.abs().amax(dim=2, keepdim=True) / ((2**bits - 1) / 2)).bfloat16().double()
        rounded = (torch.round(parts / steps).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * steps).flatten(1)
        tokens_in = x / scale
        if act_bits is not None:
            tops = tokens_in.abs().amax(dim=1, keepdim=True) / (2 ** (act_bits - 1) - 1)
            tokens_in = torch.round(tokens_in / tops) * tops
        wrong = (tokens_in @ rounded.T - x @ weight.T).abs() ** power
        found.append(float((wrong.mean(dim=1) * share).sum()))
    return found


def index_of(transform: Any, problem: GroupProblem, size: Tensor) -> int:
    """Which exponent the transform chose."""
    scale = transform.fit(problem).input_scale[0].double()
    powers = torch.stack([size.double() ** (step / transform.grid) for step in range(transform.grid)])
    powers = powers / (powers.amax(dim=1) * powers.amin(dim=1)).sqrt()[:, None]
    gap = (scale / powers).log().abs().amax(dim=1)
    assert gap.min() < 2.0**-8  # bf16
    return int(gap.argmin())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("by", ["mean", "max"])
@pytest.mark.parametrize("grid", [5, 20])
def test_awq_chooses_the_smallest_square_error(
    problem_of: Callable[..., GroupProblem], scheme: str, by: str, grid: int
) -> None:
    transform = AWQ(grid=grid, tokens=100, size=by)
    problem = problem_of(transform, scheme)
    wanted = losses(problem, by, power=2, image_weight=1.0, grid=grid, tokens=100)
    size = problem.stats.mean_abs if by == "mean" else problem.stats.abs_max.amax(dim=0)
    assert wanted[index_of(transform, problem, size)] <= min(wanted) * (1 + 1e-5)  # float32


@given(image_weight=st.sampled_from([0.0, 0.1, 1.0, 5.0, 100.0]), scheme=st.sampled_from(SCHEMES))
def test_mbq_chooses_the_smallest_balanced_absolute_error(
    problem_of: Callable[..., GroupProblem], image_weight: float, scheme: str
) -> None:
    transform = MBQ(image_weight=image_weight, tokens=100, size="max")
    problem = problem_of(transform, scheme)
    wanted = losses(problem, "max", power=1, image_weight=image_weight, grid=20, tokens=100)
    assert wanted[index_of(transform, problem, problem.stats.abs_max.amax(dim=0))] <= min(wanted) * (1 + 1e-5)


@pytest.mark.parametrize(("image_weight", "kept"), [(0.0, TEXT), (1e9, IMAGE)])
def test_the_weight_of_image_tokens_decides_whom_the_scale_serves(
    problem_of: Callable[..., GroupProblem], image_weight: float, kept: int
) -> None:
    """At the ends it is chosen as if there were tokens of one modality only."""
    problem = problem_of(MBQ())
    sample = problem.stats.sample
    images = sample.modality == IMAGE
    x = sample.x.clone()
    x[images, 50] *= 1000.0  # loud in images only: they want it shared, text wants it left
    sample = replace(sample, x=x)
    problem.stats.abs_max[IMAGE, 50] *= 1000.0
    problem = replace(problem, stats=replace(problem.stats, sample=sample))
    own = TokenSample(*(field[sample.modality == kept] for field in vars(sample).values()))
    alone = replace(problem, stats=replace(problem.stats, sample=own))
    found = MBQ(image_weight=image_weight).fit(problem).input_scale
    assert torch.equal(found, MBQ().fit(alone).input_scale)
    assert not torch.equal(found, MBQ(image_weight=1e9 if kept == TEXT else 0.0).fit(problem).input_scale)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("transform", [AWQ(), MBQ()], ids=["awq", "mbq"])
def test_no_transform_is_never_better_by_the_measure_of_the_search(
    problem_of: Callable[..., GroupProblem], transform: ScaleSearch, scheme: str
) -> None:
    """On tokens whose channels are all of one size but one, where there is little to win."""
    problem = problem_of(transform, scheme)
    sample = problem.stats.sample
    x = sample.x / sample.x.abs().amax(dim=0)
    problem = replace(problem, stats=replace(problem.stats, sample=replace(sample, x=x)))
    weight = torch.cat(list(problem.weights.values()))

    def measured(scale: Tensor) -> float:
        difference = rounded_output(x, weight, scale, problem.scheme) - x @ weight.T
        return float(transform.loss(difference, sample.modality))

    assert measured(transform.fit(problem).input_scale[0]) <= measured(torch.ones(WIDTH))


def test_mean_where_only_weights_are_rounded_else_max(problem_of: Callable[..., GroupProblem], same: Callable) -> None:
    for scheme, by in (("w3a16", "mean"), ("w4a4", "max")):
        problem = problem_of(AWQ(), scheme)
        assert same(AWQ().fit(problem), AWQ(size=by).fit(problem))
    assert not same(AWQ(size="mean").fit(problem), AWQ(size="max").fit(problem))  # else nothing was tested


def test_outputs_beyond_float32_are_the_ladders(problem_of: Callable[..., GroupProblem]) -> None:
    problem = problem_of(AWQ())
    huge = {name: 3e38 * torch.sign(w) for name, w in problem.weights.items()}
    with pytest.raises(NumericalError, match="every scale"):
        AWQ().fit(replace(problem, weights=huge))


@pytest.mark.parametrize("name", ["awq", "mbq"])
@pytest.mark.parametrize("setting", [{"grid": 0}, {"tokens": 0}, {"size": "median"}, {"image_weight": -1.0}])
def test_impossible_settings_are_refused_by_name(name: str, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"transform.*{next(iter(setting))}"):
        recipe_from({"scheme": "w4a4", "transform": {"name": name} | setting})
