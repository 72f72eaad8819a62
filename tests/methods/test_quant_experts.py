"""Quant Experts on tokens of four kinds: what is exempted, extracted, shared and routed does what it is for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.quantized import QuantizedGroup
from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import Budget, Correction, ErrorProblem, GroupProblem
from qe_dist.methods.compensation.none import NoCompensation
from qe_dist.methods.compensation.qera import QERA
from qe_dist.methods.compensation.quant_experts import SHARED_WEIGHT, QuantExperts, expert_errors
from qe_dist.methods.quantizers.rtn import RoundToNearest
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.transforms.none import NoTransform
from qe_dist.methods.transforms.outlier_smoothing import OutlierSmoothing
from qe_dist.numerics.factors import store_factor
from qe_dist.numerics.grid import dequantize
from qe_dist.numerics.reference import linear_forward, prepare, route
from qe_dist.numerics.routing import choose_experts

WIDTH, TOKENS, KINDS = 192, 800, 4
PLAIN = QuantExperts(k=64, num_experts=KINDS)
"""k = 64 is 8 of 192 channels."""
EXTRACTING = replace(PLAIN, extract=True)

Problem = Callable[..., GroupProblem]


def recipe_of(compensation: Any = PLAIN, scheme: str = "w4a6", *, rank: int = 128, factor_bits: int = 16) -> Recipe:
    """Rank 128 is 16 of 192, half of it for the shared expert: as many as there are exempted columns."""
    budget = Budget(rank=rank, factor_bits=factor_bits, capped=True)
    return Recipe(Scheme.parse(scheme), NoTransform(), RoundToNearest(), compensation, budget)


@pytest.fixture(scope="module")
def tokens(planted: Callable[..., Any]) -> Any:
    return planted(TOKENS, WIDTH, always=5, kinds=KINDS, each=6)


@pytest.fixture(scope="module")
def problem(tokens: Any, problem_for: Problem) -> GroupProblem:
    return problem_for(recipe_of(), tokens.x)


@pytest.fixture(scope="module")
def fitted(problem: GroupProblem) -> QuantizedGroup:
    return recipe_of().fit(problem)


@pytest.fixture(scope="module")
def extracted(problem: GroupProblem) -> QuantizedGroup:
    return recipe_of(EXTRACTING).fit(problem)


def after_rounding(problem: GroupProblem) -> ErrorProblem:
    """What rounding leaves when the exempted columns are zero."""
    exempt = PLAIN.exempt(problem)
    errors = {}
    for name, weight in problem.weights.items():
        codes = RoundToNearest().fit(weight.index_fill(1, exempt, 0.0), problem.stats, problem.scheme)
        errors[name] = weight - dequantize(codes.codes, codes.scale)
    return ErrorProblem(problem, errors, recipe_of().budget)


@pytest.fixture(scope="module")
def left_to_repair(problem: GroupProblem) -> ErrorProblem:
    return after_rounding(problem)


@pytest.fixture(scope="module")
def correction(left_to_repair: ErrorProblem) -> Correction:
    return PLAIN.fit(left_to_repair)


@pytest.fixture(scope="module")
def errors(left_to_repair: ErrorProblem, correction: Correction) -> Tensor:
    """Of each token with each expert. [T, E]"""
    return expert_errors(left_to_repair, correction).double()


def output(group: QuantizedGroup, x: Tensor) -> Tensor:
    ready = prepare(group.input, x, route(group.input, x), group.scheme)
    return torch.cat([linear_forward(linear, ready) for linear in group.linears.values()], dim=1)


def exact(problem: GroupProblem, x: Tensor) -> Tensor:
    return x @ torch.cat(list(problem.weights.values())).T


def test_the_channels_that_are_always_loud_are_exempted(problem: GroupProblem, tokens: Any) -> None:
    exempt = PLAIN.exempt(problem).tolist()
    assert len(exempt) == 8
    assert set(tokens.always.tolist()) <= set(exempt)
    assert set(exempt) <= set(tokens.always.tolist()) | set(tokens.own.flatten().tolist())


def test_exempted_columns_are_rounded_to_zero_and_carried(fitted: QuantizedGroup, problem: GroupProblem) -> None:
    """The shared expert has the rank for exactly these columns; whitening and the other experts take a little."""
    exempt = PLAIN.exempt(problem)
    for name, linear in fitted.linears.items():
        assert not linear.codes[:, exempt].any()
        carried = (linear.shared_up.dense @ fitted.input.shared_down.dense)[:, exempt]
        wanted = problem.weights[name][:, exempt]
        assert (carried - wanted).norm() < 0.1 * wanted.norm()


def test_a_zeroed_column_does_not_widen_the_grid_of_the_others(fitted: QuantizedGroup, problem: GroupProblem) -> None:
    exempt = PLAIN.exempt(problem)
    for name, linear in fitted.linears.items():
        rest = problem.weights[name].index_fill(1, exempt, 0.0)
        assert torch.equal(linear.scale, RoundToNearest().fit(rest, problem.stats, problem.scheme).scale)


def test_the_shared_expert_has_half_the_rank_and_each_routed_one_the_other(fitted: QuantizedGroup) -> None:
    assert fitted.input.shared_down.values.shape == (8, WIDTH)
    assert fitted.input.expert_down.values.shape == (KINDS, 8, WIDTH)
    assert fitted.input.router.shape == (KINDS, WIDTH)
    assert {n: tuple(x.expert_up.values.shape) for n, x in fitted.linears.items()} == {
        "gate": (KINDS, 48, 8),
        "up": (KINDS, 32, 8),
    }


def test_a_rank_by_ratio_is_halved_as_well(problem: GroupProblem) -> None:
    """Half of 80 outputs are 40."""
    group = replace(recipe_of(), budget=Budget(ratio=0.5)).fit(problem)
    assert group.input.shared_down.values.shape == (20, WIDTH)
    assert group.input.expert_down.values.shape == (KINDS, 20, WIDTH)


def test_the_experts_are_the_kinds_of_tokens(errors: Tensor, tokens: Any) -> None:
    """Most tokens of a kind are best served by one expert, and no two kinds by the same."""
    best = errors.argmin(dim=1)
    table = torch.stack([torch.bincount(best[tokens.kind == kind], minlength=KINDS) for kind in range(KINDS)])
    assert table.argmax(dim=1).unique().numel() == KINDS
    assert table.amax(dim=1).sum() > 0.8 * TOKENS


def test_each_routed_expert_beats_the_shared_one_alone_on_its_own_tokens(
    left_to_repair: ErrorProblem, correction: Correction, errors: Tensor, problem: GroupProblem
) -> None:
    experts = correction.experts
    silent = replace(correction, experts=replace(experts, up=torch.zeros_like(experts.up)))
    shared_alone = expert_errors(left_to_repair, silent)[:, 0].double()
    chosen = choose_experts(problem.stats.sample.router_x, correction.experts.router)
    for expert in range(KINDS):
        own = chosen == expert
        assert own.any()
        assert errors[own, expert].square().sum() < 0.95 * shared_alone[own].square().sum()


def test_expert_errors_are_what_each_token_would_lose(
    left_to_repair: ErrorProblem, correction: Correction, errors: Tensor, problem: GroupProblem
) -> None:
    """Against the output of every expert in full, in float64."""
    x = problem.stats.sample.x.double()
    step = x.abs().amax(dim=1, keepdim=True) / 31
    rounded = torch.round(x / step) * step
    weight = torch.cat(list(problem.weights.values())).double()
    error = left_to_repair.stacked.double()
    for expert in range(KINDS):
        repair = correction.shared.up.double() @ correction.shared.down.double()
        repair = repair + correction.experts.up[expert].double() @ correction.experts.down[expert].double()
        lost = (x @ weight.T - rounded @ (weight - error).T - x @ repair.T).norm(dim=1)
        assert torch.allclose(errors[:, expert], lost, rtol=1e-3)  # float32


def test_the_router_is_better_than_chance_and_near_the_oracle(
    errors: Tensor, correction: Correction, problem: GroupProblem
) -> None:
    chosen = choose_experts(problem.stats.sample.router_x, correction.experts.router)
    routed, random, oracle = errors.gather(1, chosen[:, None]).mean(), errors.mean(), errors.amin(dim=1).mean()
    assert oracle <= routed < random
    assert random - routed > 0.7 * (random - oracle)


def test_the_router_without_regression_is_better_than_chance(
    left_to_repair: ErrorProblem, problem: GroupProblem
) -> None:
    """The paper's rule, mean|residual| of every channel."""
    correction = replace(PLAIN, router="mean_residual").fit(left_to_repair)
    errors = expert_errors(left_to_repair, correction).double()
    chosen = choose_experts(problem.stats.sample.router_x, correction.experts.router)
    assert errors.gather(1, chosen[:, None]).mean() < errors.mean()


def test_the_router_reads_the_input_as_it_comes(tokens: Any, problem_for: Problem) -> None:
    """The experts see x / scale, so that the paper's rule has to be divided by the scale as well."""
    recipe = replace(recipe_of(), transform=OutlierSmoothing(k=64))
    moved = recipe.transform.fit(problem_for(recipe, tokens.x))
    left = after_rounding(moved)
    c = replace(PLAIN, router="mean_residual").fit(left)
    residual = left.stacked - c.shared.up @ c.shared.down - c.experts.up @ c.experts.down
    wanted = residual.abs().mean(dim=1) / moved.input_scale
    assert (moved.input_scale > 1).any()
    assert torch.allclose(c.experts.router, wanted, rtol=1e-4, atol=1e-6)


def test_routing_on_the_input_of_another_group_works_as_well(tokens: Any, problem_for: Problem) -> None:
    """Here that input is of another width, and says of each token which kind it is."""
    router_x = torch.nn.functional.one_hot(tokens.kind, KINDS).float()
    recipe = recipe_of()
    here, there = (recipe.fit(problem_for(recipe, tokens.x, router_x=r)) for r in (None, router_x))
    assert there.input.router.shape == (KINDS, KINDS)
    assert there.report.error < 1.05 * here.report.error


def test_experts_help_where_one_adapter_of_the_same_rank_does_not(problem: GroupProblem) -> None:
    """Equal active cost: both have rank 16 at work for each token."""
    errors = {kind: recipe_of(kind, "w4a16").fit(problem).report.error for kind in (PLAIN, QERA(), NoCompensation())}
    assert errors[PLAIN] < errors[QERA()] < errors[NoCompensation()]


def test_one_expert_is_the_shared_one_in_two_halves(problem: GroupProblem) -> None:
    group = recipe_of(replace(PLAIN, num_experts=1)).fit(problem)
    assert group.report.fallbacks == ()
    assert group.report.error < group.report.rounding_error


def test_extraction_is_exact(extracted: QuantizedGroup, problem: GroupProblem, tokens: Any) -> None:
    """For a token that is silent elsewhere the output is exact up to bf16, whatever the bits of activations."""
    expert = route(extracted.input, tokens.x)
    for chosen in range(KINDS):
        channels = torch.cat([extracted.input.shared_channels, extracted.input.expert_channels[chosen]]).long()
        assert channels.unique().numel() == channels.numel()
        rows = tokens.x[expert == chosen]
        loud = torch.zeros_like(rows).index_copy(1, channels, rows[:, channels])
        always_chosen = replace(extracted.input, router=torch.eye(KINDS)[chosen].neg()[:, None].expand(-1, WIDTH))
        wanted = exact(problem, loud)
        error = output(replace(extracted, input=always_chosen), loud) - wanted
        assert error.norm() < 2**-8 * wanted.norm()


def test_no_rank_is_spent_on_extracted_channels(extracted: QuantizedGroup) -> None:
    part = extracted.input
    assert not part.shared_down.dense[:, part.shared_channels.long()].any()
    for down, channels in zip(part.expert_down.dense, part.expert_channels.long(), strict=True):
        assert not down[:, channels].any()


def test_each_expert_extracts_channels_of_its_own(extracted: QuantizedGroup, tokens: Any) -> None:
    """The loud channels of the kind of token that it serves, beside the shared ones."""
    expert = route(extracted.input, tokens.x)
    shared = set(extracted.input.shared_channels.tolist())
    for kind in range(KINDS):
        serving = int(expert[tokens.kind == kind].mode().values)
        taken = shared | set(extracted.input.expert_channels[serving].tolist())
        assert set(tokens.own[kind].tolist()) <= taken
        assert not shared & set(extracted.input.expert_channels[serving].tolist())


def test_extraction_shrinks_the_error_of_low_bit_activations(
    fitted: QuantizedGroup, extracted: QuantizedGroup, problem: GroupProblem
) -> None:
    assert extracted.report.error < 0.5 * fitted.report.error
    smoothed = replace(recipe_of(), transform=OutlierSmoothing(k=64)).fit(problem)
    assert extracted.report.error < smoothed.report.error


def test_without_rounded_activations_extraction_gains_little(problem: GroupProblem) -> None:
    kept, carried = (recipe_of(c, "w4a16").fit(problem).report.error for c in (PLAIN, EXTRACTING))
    assert carried > 0.3 * kept


@pytest.mark.parametrize("compensation", [PLAIN, EXTRACTING], ids=["plain", "extracting"])
def test_int8_factors_cost_little(compensation: QuantExperts, problem: GroupProblem) -> None:
    wide, narrow = (recipe_of(compensation, factor_bits=bits).fit(problem).report for bits in (16, 8))
    assert narrow.error < 1.03 * wide.error
    assert narrow.bytes < 0.85 * wide.bytes


def best_repair(error: Tensor, gram: Tensor, rank: int) -> Tensor:
    """L = U U^T E, with U the top eigenvectors of E G E^T."""
    error, gram = error.double(), gram.double()
    up = torch.linalg.eigh(error @ gram @ error.T).eigenvectors[:, -rank:]
    return up @ (up.T @ error)


def energy(error: Tensor, gram: Tensor) -> Tensor:
    return (error @ gram * error).sum()


def test_a_round_fits_each_expert_to_the_tokens_that_the_router_gave_it(
    left_to_repair: ErrorProblem, correction: Correction, problem: GroupProblem
) -> None:
    stats = problem.stats
    chosen = choose_experts(stats.sample.router_x, correction.experts.router)
    again = replace(PLAIN, rounds=1).fit(left_to_repair)
    left = left_to_repair.stacked.double() - again.shared.up.double() @ again.shared.down.double()
    for expert in range(KINDS):
        x = stats.sample.x[chosen == expert].double()
        gram = x.T @ x + SHARED_WEIGHT * len(x) / TOKENS * stats.total_gram.double()
        found = again.experts.up[expert].double() @ again.experts.down[expert].double()
        best, first = best_repair(left, gram, rank=8), correction.experts.up[expert] @ correction.experts.down[expert]
        lost, least, before = (energy(left - repair, gram) for repair in (found, best, first.double()))
        assert lost < 1.001 * least < before


def test_rounds_find_kinds_of_tokens_that_clusters_missed(tokens: Any, problem_for: Problem) -> None:
    """One important channel per token says little about its kind."""
    blind = recipe_of(replace(PLAIN, k=1, exempt_columns=False), "w4a16")
    again = replace(blind, compensation=replace(blind.compensation, rounds=2))
    before, after = (recipe.fit(problem_for(recipe, tokens.x)).report.error for recipe in (blind, again))
    assert after < 0.98 * before


def test_without_exempted_columns_the_codes_are_those_of_the_whole_weight(problem: GroupProblem) -> None:
    group = recipe_of(replace(PLAIN, exempt_columns=False)).fit(problem)
    for name, linear in group.linears.items():
        assert torch.equal(
            linear.codes, RoundToNearest().fit(problem.weights[name], problem.stats, problem.scheme).codes
        )


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_routed_experts_start_from_the_shared_one_as_it_is_stored(left_to_repair: ErrorProblem, bits: int) -> None:
    down = PLAIN.fit(replace(left_to_repair, budget=Budget(rank=128, factor_bits=bits, capped=True))).shared.down
    assert torch.equal(store_factor(down, bits).dense, down)


def test_refinement_is_not_worse_than_none(problem: GroupProblem) -> None:
    """On the error of the weights, which is what it trains for."""
    before, after = (recipe_of(replace(PLAIN, refine_epochs=epochs), "w4a16").fit(problem) for epochs in (0, 1))
    assert after.report.error <= before.report.error * (1 + 1e-4)  # the factors are rounded to bf16 after it


def test_extraction_needs_exempted_columns() -> None:
    with pytest.raises(ConfigError, match=r"extract.*exempt_columns"):
        replace(EXTRACTING, exempt_columns=False)


def test_extraction_and_refinement_do_not_go_together() -> None:
    """It would train the experts for channels that are carried exactly."""
    with pytest.raises(ConfigError, match=r"refine_epochs.*extract"):
        replace(EXTRACTING, refine_epochs=1)


VARIANTS = [EXTRACTING, replace(EXTRACTING, num_experts=8), replace(PLAIN, router="mean_residual"), replace(PLAIN, k=1)]


@pytest.mark.parametrize("compensation", VARIANTS, ids=["extract", "extract, 8 experts", "mean_residual", "k = 1"])
@pytest.mark.parametrize("count", [1, 2, 20])
def test_few_tokens_are_enough(compensation: QuantExperts, tokens: Any, problem_for: Problem, count: int) -> None:
    recipe = recipe_of(compensation, "w4a8")
    bare = recipe_of(NoCompensation(), "w4a8")
    report = recipe.fit(problem_for(recipe, tokens.x[:count])).report
    assert report.fallbacks == ()
    assert report.error <= bare.fit(problem_for(bare, tokens.x[:count])).report.error


def test_channels_that_fill_up_are_not_extracted_twice(problem_for: Problem, normal: Callable[..., Tensor]) -> None:
    """Where only a few channels are ever important, an expert must fill up with others than the shared ones."""
    x = 0.01 * normal(0, 300, WIDTH)
    x[:, :8] = normal(1, 300, 8).sign() * 10  # the first eight, and never another
    recipe = recipe_of(EXTRACTING)
    group = recipe.fit(problem_for(recipe, x))
    shared = set(group.input.shared_channels.tolist())
    assert shared == set(range(8))
    assert all(shared.isdisjoint(channels) for channels in group.input.expert_channels.tolist())
    assert group.report.error < 0.01


@pytest.mark.parametrize(
    "settings",
    [{"k": 0}, {"num_experts": 0}, {"refine_epochs": -1}, {"rounds": -1}],
    ids=lambda settings: next(iter(settings)),
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        QuantExperts(**settings)


@pytest.mark.parametrize("compensation", [PLAIN, EXTRACTING])
@pytest.mark.parametrize(("extra_bits", "factor_bits"), [(14.0, 16), (14.0, 8), (14.0, 4), (9.0, 16)])
def test_a_byte_budget_is_kept_and_nearly_used(
    problem: GroupProblem, compensation: QuantExperts, extra_bits: float, factor_bits: int
) -> None:
    """Routers, columns and all: below what was asked, by less than one more rank for every expert."""
    budget = Budget(extra_bits=extra_bits, factor_bits=factor_bits)
    group = replace(recipe_of(compensation), budget=budget).fit(problem)
    plain = recipe_of(NoCompensation()).fit(problem)
    assert group.report is not None
    assert plain.report is not None
    stored = 8 * (group.report.bytes - plain.report.bytes) / problem.num_weights
    outputs = problem.num_weights // WIDTH
    one_rank = (1 + KINDS) * (WIDTH + outputs) * max(8, factor_bits) / problem.num_weights  # two at 4 bits
    indices = 0.1
    assert extra_bits - one_rank - indices < stored < extra_bits + indices
