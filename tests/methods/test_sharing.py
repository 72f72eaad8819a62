"""The groups of a block share a byte budget: it is kept, and it goes where it does most."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qe_dist.core.errors import NumericalError
from qe_dist.core.quantized import QuantizedGroup, input_tensors, repair_tensors
from qe_dist.core.scheme import Scheme
from qe_dist.core.spec import InputGroup, LinearSpec
from qe_dist.methods.base import Budget, Correction, ErrorProblem, GroupProblem
from qe_dist.methods.compensation.qera import QERA
from qe_dist.methods.quantizers.rtn import RoundToNearest
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.transforms.none import NoTransform
from qe_dist.numerics.stats import GroupStats

TOKENS = 400
SHAPES = {"qkv": (64, (64, 16, 16)), "o": (64, (64,)), "gate_up": (64, (96, 96)), "down": (96, (64,))}
"""Inputs and outputs of the groups of a block."""

Planted = Callable[..., object]
Same = Callable[..., bool]


def recipe_of(extra_bits: float, factor_bits: int = 16) -> Recipe:
    budget = Budget(extra_bits=extra_bits, factor_bits=factor_bits)
    return Recipe(Scheme.parse("w3a16"), NoTransform(), RoundToNearest(), QERA(), budget)


def problem_of(name: str, x: Tensor, outputs: tuple[int, ...], seed: int = 0) -> GroupProblem:
    width = x.shape[1]
    specs = tuple(LinearSpec(f"{name}{i}", width, size, False, "column") for i, size in enumerate(outputs))
    random = torch.Generator().manual_seed(width + sum(outputs) + seed)
    weights = {s.name: torch.randn(s.out_features, width, generator=random) / width**0.5 for s in specs}
    stats = GroupStats.empty(weights, width, QERA().needs(), sample_size=1024)
    modality, rows = torch.zeros(len(x), dtype=torch.int8), torch.arange(len(x))
    stats.update(x, x, modality, rows)
    return GroupProblem(InputGroup(name, specs, router_input=name), weights, stats, Scheme.parse("w3a16"), seed=5)


@pytest.fixture(scope="module")
def block(planted: Planted) -> dict[str, GroupProblem]:
    """Some groups read channels of very different size, others white noise, where directions are worth less."""

    def tokens(name: str, width: int) -> Tensor:
        loud = planted(TOKENS + len(name), width).x
        return loud if name in ("qkv", "down") else loud / loud.square().mean(dim=0).sqrt()

    return {name: problem_of(name, tokens(name, width), outputs) for name, (width, outputs) in SHAPES.items()}


def extra_bits_of(group: QuantizedGroup) -> int:
    """Stored beside codes and scales."""
    parts = [input_tensors(group.input), *(repair_tensors(linear) for linear in group.linears.values())]
    return sum(8 * t.numel() * t.element_size() for tensors in parts for t in tensors.values())


def rank_of(group: QuantizedGroup) -> int:
    return 0 if group.input.shared_down is None else group.input.shared_down.shape[0]


def weights_of(problems: Mapping[str, GroupProblem]) -> int:
    return sum(w.numel() for p in problems.values() for w in p.weights.values())


def total_error(groups: Mapping[str, QuantizedGroup]) -> float:
    return sum(group.report.error**2 for group in groups.values())


@given(
    extra_bits=st.floats(0.02, 4.0),
    factor_bits=st.sampled_from([4, 8, 16]),
    names=st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True),
)
def test_a_block_never_stores_more_than_its_budget(
    block: dict[str, GroupProblem], extra_bits: float, factor_bits: int, names: list[str]
) -> None:
    problems = {name: block[name] for name in names}
    groups = recipe_of(extra_bits, factor_bits).fit_block(problems)
    assert list(groups) == names
    assert sum(map(extra_bits_of, groups.values())) <= extra_bits * weights_of(problems)
    assert all(group.report.fallbacks == () for group in groups.values())


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
@pytest.mark.parametrize("extra_bits", [0.5, 1.0, 2.0])
def test_sharing_is_not_worse_than_an_even_share(
    block: dict[str, GroupProblem], extra_bits: float, factor_bits: int
) -> None:
    recipe = recipe_of(extra_bits, factor_bits)
    shared = recipe.fit_block(block)
    even = {name: recipe.fit(problem) for name, problem in block.items()}
    assert total_error(shared) < total_error(even)
    assert {n: rank_of(g) for n, g in shared.items()} != {n: rank_of(g) for n, g in even.items()}


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
@pytest.mark.parametrize("extra_bits", [0.3, 0.9, 2.0])
@pytest.mark.parametrize("name", SHAPES)
def test_a_group_alone_gets_its_own_share(
    block: dict[str, GroupProblem], name: str, extra_bits: float, factor_bits: int
) -> None:
    recipe = recipe_of(extra_bits, factor_bits)
    problem = block[name]
    wanted = recipe.budget.rank_for(problem.num_outputs, problem.group.in_features)
    assert rank_of(recipe.fit(problem)) == wanted


def test_the_bits_do_not_depend_on_the_call_or_the_order_of_the_groups(
    block: dict[str, GroupProblem], same: Same
) -> None:
    recipe = recipe_of(0.7)

    def bits(problems: Mapping[str, GroupProblem]) -> dict[str, object]:
        torch.manual_seed(len(problems))  # the global state has no say
        return {name: (g.input, g.linears) for name, g in sorted(recipe.fit_block(problems).items())}

    first = bits(block)
    assert same(bits(block), first)
    assert same(bits(dict(reversed(block.items()))), first)


@dataclass(frozen=True)
class Fragile(QERA):
    """Cannot repair the widest group, or says NaN there."""

    says_nan: bool = False

    def fit(self, problem: ErrorProblem) -> Correction:
        correction = super().fit(problem)
        if problem.granted is None or problem.problem.group.name != "down":
            return correction
        if self.says_nan:
            return Correction(replace(correction.shared, up=correction.shared.up * math.nan))
        raise NumericalError("down is beyond me")


@pytest.mark.parametrize("says_nan", [False, True])
def test_a_failed_repair_is_left_out_and_said(block: dict[str, GroupProblem], same: Same, says_nan: bool) -> None:
    recipe = recipe_of(0.7)
    healthy = recipe.fit_block(block)
    groups = replace(recipe, compensation=Fragile(says_nan=says_nan)).fit_block(block)
    (note,) = groups["down"].report.fallbacks
    assert note.startswith(f"no repair of rank {rank_of(healthy['down'])}: ")
    assert rank_of(healthy["down"]) > 0
    assert extra_bits_of(groups["down"]) == 0
    assert groups["down"].report.error == groups["down"].report.rounding_error
    for name in block.keys() - {"down"}:
        assert same((groups[name].input, groups[name].linears), (healthy[name].input, healthy[name].linears))


def test_a_group_that_cannot_be_solved_leaves_the_others_their_own_budget(
    block: dict[str, GroupProblem], same: Same
) -> None:
    stats = block["o"].stats
    poisoned = block | {"o": replace(block["o"], stats=replace(stats, gram=stats.gram * math.nan))}
    others = {name: problem for name, problem in block.items() if name != "o"}
    recipe = recipe_of(0.7)
    groups, wanted = recipe.fit_block(poisoned), recipe.fit_block(others)
    assert groups["o"].report.fallbacks[-1] == "RTN without transform and compensation"
    assert extra_bits_of(groups["o"]) == 0
    for name in others:
        assert same((groups[name].input, groups[name].linears), (wanted[name].input, wanted[name].linears))
