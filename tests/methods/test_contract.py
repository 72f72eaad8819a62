"""What every method must keep to, whoever wrote it: every file of every axis, beside every other one.

Not every combination is fitted, but every pair of members in some combination. A method that is added to a folder is
found and tested here without a line of change.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qe_dist import methods
from qe_dist.core.batch import TEXT
from qe_dist.core.errors import ConfigError
from qe_dist.core.quantized import QuantizedGroup, all_finite, input_tensors, repair_tensors
from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import (
    Budget,
    Compensation,
    Correction,
    ErrorProblem,
    Experts,
    GroupProblem,
    LowRank,
    Quantizer,
    SalientColumns,
    Transform,
)
from qe_dist.methods.compensation.none import NoCompensation
from qe_dist.methods.recipe import Recipe
from qe_dist.numerics.packing import pack
from qe_dist.numerics.reference import linear_forward, prepare, route

WIDTH, TOKENS = 96, 320
PROTOCOLS = {"transform": Transform, "quantizer": Quantizer, "compensation": Compensation}
MEMBERS = [(axis, name) for axis in methods.AXES for name in methods.names(axis)]
EVERY = list(itertools.product(*(methods.names(axis) for axis in methods.AXES)))
PLAIN = ("none", "rtn", "none")

Problem = Callable[..., GroupProblem]
Same = Callable[[Any, Any], bool]


def recipe_of(combination: tuple[str, ...], scheme: str = "w4a6") -> Recipe:
    members = {axis: methods.get(axis, name)() for axis, name in zip(methods.AXES, combination, strict=True)}
    return Recipe(Scheme.parse(scheme), **members, budget=Budget(rank=64, capped=True))


def is_possible(combination: tuple[str, ...]) -> bool:
    """Some members do not go together; `test_a_clash_names_both_parts` looks at how that is said."""
    with contextlib.suppress(ConfigError):
        return bool(recipe_of(combination))
    return False


COMBINATIONS = [combination for combination in EVERY if is_possible(combination)]


def pairs_of(combination: tuple[str, ...]) -> set[tuple[tuple[str, str], ...]]:
    """Of the members, each with its axis."""
    return set(itertools.combinations(zip(methods.AXES, combination, strict=True), 2))


def likeness_to_plain(combination: tuple[str, ...]) -> int:
    return sum(a == b for a, b in zip(combination, PLAIN, strict=True))


def covering(combinations: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Few of them that hold every pair of members that any holds; the plainer ones, which are faster."""
    left, ranked = set().union(*map(pairs_of, combinations)), sorted(combinations, key=likeness_to_plain, reverse=True)
    chosen = []
    while left:
        chosen.append(max(ranked, key=lambda c: len(pairs_of(c) & left)))
        left -= pairs_of(chosen[-1])
    return chosen


PAIRWISE = covering(COMBINATIONS)


def with_member(axis: str, name: str) -> Recipe:
    """The plainest recipe that has this member."""
    place = list(methods.AXES).index(axis)
    own = [c for c in COMBINATIONS if c[place] == name]
    return recipe_of(max(own, key=likeness_to_plain))


WITH_GRAM = [combination for combination in PAIRWISE if recipe_of(combination).needs().gram]


@pytest.fixture(scope="module")
def x(planted: Callable[..., Any]) -> Tensor:
    return planted(TOKENS, WIDTH).x


@pytest.fixture(scope="module", params=PAIRWISE, ids="-".join)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return recipe_of(request.param)


@pytest.fixture(scope="module")
def problem(recipe: Recipe, x: Tensor, problem_for: Problem) -> GroupProblem:
    return problem_for(recipe, x)


@pytest.fixture(scope="module")
def fitted(recipe: Recipe, problem: GroupProblem) -> QuantizedGroup:
    """Of the healthy problem; of a copy, so that nobody else sees what a fit may do to it."""
    return recipe.fit(copy.deepcopy(problem))


def without_seconds(group: QuantizedGroup) -> QuantizedGroup:
    return replace(group, report=replace(group.report, seconds=0.0))


def assert_stored_numbers_are_finite(group: QuantizedGroup) -> None:
    assert all_finite(input_tensors(group.input))
    for linear in group.linears.values():
        assert all_finite({"scale": linear.scale, **repair_tensors(linear)})
    errors = [group.report.error, group.report.rounding_error, *group.report.error_by_modality.values()]
    assert all(e is None or math.isfinite(e) for e in errors)


def is_plain_rounding(group: QuantizedGroup, problem: GroupProblem, same: Same) -> bool:
    plain = replace(recipe_of(PLAIN), scheme=group.scheme).fit(problem)
    return same((group.input, group.linears), (plain.input, plain.linears))


@pytest.mark.parametrize(("axis", "name"), MEMBERS)
def test_a_member_is_a_frozen_dataclass_of_its_axis(axis: str, name: str) -> None:
    kind = methods.get(axis, name)
    member = kind()  # every setting has a default
    assert isinstance(member, PROTOCOLS[axis])
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{kind.__name__}(")  # what dataclass writes where nobody did
    assert pickle.loads(pickle.dumps(member)) == member


@pytest.mark.parametrize("combination", [c for c in EVERY if c not in COMBINATIONS], ids="-".join)
def test_a_clash_names_both_parts(combination: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        recipe_of(combination)
    named = [a for a, name in zip(methods.AXES, combination, strict=True) if f"{a} {name}" in str(refused.value)]
    assert len(named) == 2


def test_what_is_fitted_holds_every_possible_pair() -> None:
    assert set().union(*map(pairs_of, PAIRWISE)) == set().union(*map(pairs_of, COMBINATIONS))
    assert {(a, n) for c in PAIRWISE for a, n in zip(methods.AXES, c, strict=True)} == set(MEMBERS)


@pytest.mark.parametrize("axis", methods.AXES)
def test_an_unknown_member_is_refused_with_the_known_ones(axis: str) -> None:
    with pytest.raises(ConfigError, match=rf"{axis} 'unheard'.*{methods.names(axis)[0]}"):
        methods.get(axis, "unheard")


def test_healthy_statistics_need_no_fall_back(fitted: QuantizedGroup) -> None:
    assert fitted.report.fallbacks == ()
    assert_stored_numbers_are_finite(fitted)


def test_equal_problems_give_equal_bits_and_stay_as_they_were(
    recipe: Recipe, problem: GroupProblem, fitted: QuantizedGroup, same: Same
) -> None:
    before = copy.deepcopy(problem)
    torch.manual_seed(77)  # the global state has no say
    assert same(without_seconds(recipe.fit(problem)), without_seconds(fitted))
    assert same(problem, before)


def test_a_result_travels_between_processes(fitted: QuantizedGroup, same: Same) -> None:
    assert same(pickle.loads(pickle.dumps(fitted)), fitted)


def test_a_recipe_travels_between_processes(recipe: Recipe) -> None:
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_codes_and_scales_are_of_the_scheme(recipe: Recipe, fitted: QuantizedGroup, problem: GroupProblem) -> None:
    limit = 2 ** (recipe.scheme.weight_bits - 1)
    assert list(fitted.linears) == list(problem.weights)
    for name, linear in fitted.linears.items():
        assert linear.codes.shape == problem.weights[name].shape
        assert linear.codes.min() >= -limit
        assert linear.codes.max() <= limit - 1
        assert linear.scale.shape == (linear.codes.shape[0], 1)
        assert linear.scale.dtype == torch.bfloat16
        assert (linear.scale > 0).all()


def test_the_report_says_what_a_reader_would_measure(
    fitted: QuantizedGroup, problem: GroupProblem, recipe: Recipe, x: Tensor
) -> None:
    modality = (torch.arange(TOKENS) % 2).to(torch.int8)
    ready = prepare(fitted.input, x, route(fitted.input, x, modality), recipe.scheme, modality)
    wanted = torch.cat([x @ w.T for w in problem.weights.values()], dim=1).double()
    found = torch.cat([linear_forward(linear, ready) for linear in fitted.linears.values()], dim=1)

    def error(rows: Tensor | slice) -> float:
        return float((wanted - found)[rows].norm() / wanted[rows].norm())

    assert fitted.report.error == pytest.approx(error(slice(None)), rel=1e-4)
    by_modality = {"text": error(modality == 0), "image": error(modality == 1)}
    assert fitted.report.error_by_modality == pytest.approx(by_modality, rel=1e-4)


def test_the_report_counts_every_stored_byte(fitted: QuantizedGroup, recipe: Recipe) -> None:
    tensors = list(input_tensors(fitted.input).values())
    for linear in fitted.linears.values():
        tensors += [pack(linear.codes, recipe.scheme.weight_bits), linear.scale, *repair_tensors(linear).values()]
    assert fitted.report.bytes == sum(t.numel() * t.element_size() for t in tensors)


def test_merged_statistics_give_the_same_bits(recipe: Recipe, x: Tensor, problem_for: Problem, same: Same) -> None:
    """Parts that are merged in batch order, as against one pass over the same batches."""
    streamed = recipe.fit(problem_for(recipe, x, batches=3))
    merged = recipe.fit(problem_for(recipe, x, batches=3, merged=True))
    assert same(without_seconds(merged), without_seconds(streamed))


@pytest.fixture(scope="module")
def fit_of(x: Tensor, problem_for: Problem) -> Callable[[tuple[str, ...], str], QuantizedGroup]:
    """fit_of(combination, scheme), once."""

    @functools.cache
    def fit(combination: tuple[str, ...], scheme: str) -> QuantizedGroup:
        recipe = recipe_of(combination, scheme)
        return recipe.fit(problem_for(recipe, x))

    return fit


@pytest.mark.parametrize("combination", PAIRWISE, ids="-".join)
@pytest.mark.parametrize("scheme", ["w4a16", "w3a16g32"])
def test_a_repair_helps_where_only_weights_are_rounded(
    combination: tuple[str, ...], scheme: str, fit_of: Callable[[tuple[str, ...], str], QuantizedGroup]
) -> None:
    """Against its own codes, and against the same transform and quantizer without it."""
    report = fit_of(combination, scheme).report
    assert report.error <= report.rounding_error * (1 + 1e-3)  # factors are bf16
    assert report.fallbacks == ()
    without = (*combination[:2], "none")
    if without in COMBINATIONS:
        assert report.error <= fit_of(without, scheme).report.error * (1 + 1e-3)


@pytest.mark.parametrize("name", methods.names("transform"))
def test_a_transform_keeps_the_product(name: str, x: Tensor, problem_for: Problem) -> None:
    """With a scale per modality that of text tokens: see test_masquant.py for what repairs the others."""
    recipe = with_member("transform", name)
    problem = problem_for(recipe, x)
    moved = recipe.transform.fit(problem)
    before, after, modality = problem.stats.sample.x, moved.stats.sample.x, problem.stats.sample.modality
    scale = torch.ones(1, WIDTH) if moved.input_scale is None else moved.input_scale
    assert torch.equal(after, before / scale[modality.long() if len(scale) > 1 else 0])
    assert torch.equal(moved.stats.sample.keys, problem.stats.sample.keys)
    kept = modality == TEXT if len(scale) > 1 else slice(None)
    for weight, changed in zip(problem.weights.values(), moved.weights.values(), strict=True):
        wanted = before[kept] @ weight.T
        assert (after[kept] @ changed.T - wanted).abs().max() < 1e-5 * wanted.abs().max()  # float32


@pytest.mark.parametrize("name", methods.names("transform"))
def test_the_scale_of_a_transform_is_stored_as_it_was_used(name: str, x: Tensor, problem_for: Problem) -> None:
    recipe = with_member("transform", name)
    moved = recipe.transform.fit(problem_for(recipe, x))
    if moved.input_scale is not None:
        assert torch.equal(moved.input_scale, moved.input_scale.bfloat16().float())
        assert (moved.input_scale > 0).all()


@pytest.mark.parametrize("name", methods.names("compensation"))
def test_exempted_columns_are_distinct_channels(name: str, x: Tensor, problem_for: Problem) -> None:
    recipe = recipe_of((*PLAIN[:2], name))
    exempt = recipe.compensation.exempt(problem_for(recipe, x)).tolist()
    assert len(set(exempt)) == len(exempt)
    assert set(exempt) <= set(range(WIDTH))


def dead_channel(x: Tensor) -> Tensor:
    return x.index_fill(1, torch.tensor([0, 17]), 0.0)


def few_tokens(x: Tensor) -> Tensor:
    return x[:20]


def one_token(x: Tensor) -> Tensor:
    return x[:1]


def all_tokens_alike(x: Tensor) -> Tensor:
    return x[:1].expand(50, -1).contiguous()


def silence(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


@pytest.mark.parametrize("change", [dead_channel, few_tokens, one_token, all_tokens_alike, silence])
def test_poor_statistics_are_enough(
    recipe: Recipe, x: Tensor, problem_for: Problem, change: Callable[[Tensor], Tensor]
) -> None:
    group = recipe.fit(problem_for(recipe, change(x)))
    assert group.report.fallbacks == ()
    assert_stored_numbers_are_finite(group)
    assert group.report.error < 1


def test_a_group_size_that_does_not_fit_is_the_users_error(x: Tensor, problem_for: Problem) -> None:
    recipe = recipe_of(PLAIN, "w4a16g64")
    with pytest.raises(ConfigError, match="group size 64"):
        recipe.fit(problem_for(recipe, x))


def poisoned(problem: GroupProblem, bad: float) -> GroupProblem:
    gram = problem.stats.gram.clone()
    gram[:, 3, 4] = bad
    return replace(problem, stats=replace(problem.stats, gram=gram))


with_gram = pytest.mark.parametrize("recipe", WITH_GRAM, ids="-".join, indirect=True)


@with_gram
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_poisoned_gram_matrix_ends_in_plain_rounding_and_says_so(
    recipe: Recipe, problem: GroupProblem, same: Same, bad: float
) -> None:
    group = recipe.fit(poisoned(problem, bad))
    assert [note.split(":")[0] for note in group.report.fallbacks] == [
        "step 'as asked' of the ladder failed",
        "step 'float64' of the ladder failed",
        "step 'float64 and 1% damping' of the ladder failed",
        "RTN without transform and compensation",
    ]
    assert is_plain_rounding(group, problem, same)
    assert_stored_numbers_are_finite(group)


@with_gram
def test_what_float32_cannot_hold_is_solved_in_float64(
    recipe: Recipe, problem: GroupProblem, fitted: QuantizedGroup
) -> None:
    """The optimum does not depend on the size of the Gram matrix. A method may also cope with it by itself."""
    huge = problem.stats.gram * (3e38 / problem.stats.gram.abs().max())
    group = recipe.fit(replace(problem, stats=replace(problem.stats, gram=huge)))
    assert group.report.fallbacks[-1:] in ((), ("solved by 'float64'",))
    assert group.report.error < 1.2 * fitted.report.error  # the metric of an expert mixes in its own tokens
    stored = {n: (t.dtype, t.shape) for n, t in input_tensors(group.input).items()}
    assert stored == {n: (t.dtype, t.shape) for n, t in input_tensors(fitted.input).items()}


def test_every_step_of_the_ladder_is_recorded(x: Tensor, problem_for: Problem) -> None:
    recipe = recipe_of(("none", "rtn", "qera"))
    problem = problem_for(recipe, x)
    huge = problem.stats.gram * (3e38 / problem.stats.gram.abs().max())
    failed, solved = recipe.fit(replace(problem, stats=replace(problem.stats, gram=huge))).report.fallbacks
    assert failed.startswith("step 'as asked' of the ladder failed: ")
    assert solved == "solved by 'float64'"


@dataclass(frozen=True)
class Given(NoCompensation):
    """A compensation that repairs whatever it is told to."""

    correction: Correction

    def fit(self, problem: ErrorProblem) -> Correction:
        return self.correction


@pytest.mark.parametrize("part", ["shared", "experts", "router", "salient"])
def test_a_repair_with_a_nan_is_never_stored(
    part: str, x: Tensor, problem_for: Problem, normal: Callable[..., Tensor], same: Same
) -> None:
    up, down, router = normal(0, 80, 2), normal(1, 2, WIDTH), normal(2, 3, WIDTH)
    bad = up.index_put((torch.tensor(60), torch.tensor(1)), torch.tensor(math.nan))
    experts = Experts(up.expand(3, -1, -1), down.expand(3, -1, -1), router)
    correction = {
        "shared": Correction(LowRank(bad, down)),
        "experts": Correction(experts=replace(experts, up=bad.expand(3, -1, -1))),
        "router": Correction(experts=replace(experts, router=router * math.inf)),
        "salient": Correction(salient=SalientColumns(torch.tensor([3, 4]), bad)),
    }[part]
    recipe = replace(recipe_of(PLAIN), compensation=Given(correction))
    problem = problem_for(recipe, x)
    group = recipe.fit(problem)
    assert group.report.fallbacks[-1] == "RTN without transform and compensation"
    assert is_plain_rounding(group, problem, same)


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
def test_an_extracted_channel_is_exact_whatever_else_repairs_it(
    x: Tensor, problem_for: Problem, normal: Callable[..., Tensor], factor_bits: int
) -> None:
    """Low-rank factors may reach into extracted channels: the stored columns make up for it, up to their bf16."""
    channels = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2))[:12].view(4, 3)
    correction = Correction(
        LowRank(normal(3, 80, 2), 0.1 * normal(4, 2, WIDTH)),
        Experts(normal(5, 3, 80, 2), 0.1 * normal(6, 3, 2, WIDTH), normal(7, 3, WIDTH), channels[:3]),
        extracted=channels[3],
    )
    recipe = replace(
        recipe_of(PLAIN, "w4a4"),
        compensation=Given(correction),
        budget=Budget(rank=1, factor_bits=factor_bits, capped=True),
    )
    problem = problem_for(recipe, x)
    group = recipe.fit(problem)
    expert = route(group.input, x)
    assert expert.unique().numel() == 3
    kept = torch.zeros_like(x).scatter(1, channels[expert], 1.0).index_fill(1, channels[3], 1.0)
    loud = normal(8, *x.shape) * kept
    ready = prepare(group.input, loud, expert, recipe.scheme)
    for name, linear in group.linears.items():
        wanted = loud @ problem.weights[name].T
        assert (linear_forward(linear, ready) - wanted).norm() < 2**-8 * wanted.norm()


def test_without_a_finite_token_there_is_plain_rounding_and_a_note(
    recipe: Recipe, x: Tensor, problem_for: Problem, problem: GroupProblem, same: Same
) -> None:
    group = recipe.fit(problem_for(recipe, torch.full_like(x, math.nan)))
    assert group.report.fallbacks == (
        f"{TOKENS} of {TOKENS} tokens have a NaN or Inf at this input and were left out",
        "RTN without transform and compensation",
    )
    assert is_plain_rounding(group, problem, same)
    assert_stored_numbers_are_finite(group)
    assert group.report.error is None  # nothing was measured


def test_a_few_bad_tokens_are_left_out_with_a_note(
    recipe: Recipe, x: Tensor, problem_for: Problem, fitted: QuantizedGroup
) -> None:
    sick = x.clone()
    sick[[3, 50], 7] = math.inf
    group = recipe.fit(problem_for(recipe, sick))
    assert group.report.fallbacks == (f"2 of {TOKENS} tokens have a NaN or Inf at this input and were left out",)
    assert group.report.error < 1.5 * fitted.report.error


@pytest.mark.parametrize("name", methods.names("compensation"))
def test_a_budget_too_small_for_a_rank_is_survived(name: str, x: Tensor, problem_for: Problem) -> None:
    recipe = replace(recipe_of((*PLAIN[:2], name)), budget=Budget(extra_bits=0.01))
    group = recipe.fit(problem_for(recipe, x))
    assert group.report.fallbacks == ()
    assert_stored_numbers_are_finite(group)


BUDGETS = {
    "rank": Budget(rank=7),
    "rank of named recipes": Budget(rank=64, capped=True),
    "ratio": Budget(ratio=0.5),
    "rank at 8 bits": Budget(rank=6, factor_bits=8),
    "odd rank at 4 bits": Budget(rank=7, factor_bits=4),
    "bytes": Budget(extra_bits=4.0),
    "bytes at 4 bits": Budget(extra_bits=2.0, factor_bits=4),
    "next to no bytes": Budget(extra_bits=0.01, factor_bits=8),
}
SETTINGS = [
    *((name, {}) for name in methods.names("compensation")),
    ("quant_experts", {"extract": True}),
    ("quant_experts", {"exempt_columns": False}),
    ("salient", {"share": 0.5}),
]


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=list(BUDGETS))
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_what_is_stored_is_never_more_than_a_compensation_states(
    name: str, settings: dict[str, Any], budget: Budget, x: Tensor, problem_for: Problem
) -> None:
    compensation = methods.get("compensation", name)(**settings)
    recipe = replace(recipe_of((*PLAIN[:2], name)), compensation=compensation, budget=budget)
    group = recipe.fit(problem_for(recipe, x, router_x=x[:, :50].contiguous()))
    parts = [input_tensors(group.input), *map(repair_tensors, group.linears.values())]
    found = sum(tensor.nbytes for part in parts for tensor in part.values())
    stated = compensation.most_bytes(80, WIDTH, 50, budget)
    assert group.report.fallbacks == ()
    assert found <= stated
    if budget.extra_bits is None:  # of bytes, as many are used as whole ranks take
        assert stated <= 1.05 * found


@pytest.mark.parametrize("name", methods.names("compensation"))
@pytest.mark.parametrize("rank", [7 * 16, 64])
def test_4_bit_factors_take_any_rank(name: str, rank: int, x: Tensor, problem_for: Problem) -> None:
    """An odd one too (7 and 4 of 96 channels; Quant Experts halve them): what is missing to an even one is zeros."""
    recipe = recipe_of((*PLAIN[:2], name), "w4a16")
    narrow = replace(recipe, budget=Budget(rank=rank, factor_bits=4, capped=True)).fit(problem_for(recipe, x))
    wide = replace(recipe, budget=Budget(rank=rank, factor_bits=8, capped=True)).fit(problem_for(recipe, x))
    assert narrow.report.fallbacks == ()
    assert narrow.report.bytes <= wide.report.bytes
    assert narrow.report.error <= wide.report.rounding_error


@pytest.mark.parametrize(
    ("ratio", "outputs", "width", "rank"),
    [(0.05, 2048, 1536, 76), (0.2, 2048, 1536, 307), (0.05, 256, 1536, 32), (0.2, 20, 1536, 20), (1.0, 64, 48, 48)],
)
def test_a_ratio_becomes_a_share_of_the_smaller_dimension(ratio: float, outputs: int, width: int, rank: int) -> None:
    """At least 32, and no more than there is."""
    assert Budget(ratio=ratio).rank_for(outputs, width) == rank


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
@pytest.mark.parametrize("extra_bits", [0.5, 1.0, 3.0])
def test_bytes_become_the_largest_rank_that_they_can_store(
    x: Tensor, problem_for: Problem, extra_bits: float, factor_bits: int
) -> None:
    problem = problem_for(recipe_of(PLAIN), x)
    weights = sum(w.numel() for w in problem.weights.values())
    outputs = sum(w.shape[0] for w in problem.weights.values())
    rank = Budget(extra_bits=extra_bits, factor_bits=factor_bits).rank_for(outputs, WIDTH)
    scale_bits = 0 if factor_bits == 16 else 16
    per_rank = factor_bits * (WIDTH + outputs) + scale_bits
    spare = extra_bits * weights - outputs * scale_bits
    step = 2 if factor_bits == 4 else 1
    assert rank * per_rank <= max(0, spare) < (rank + step) * per_rank
