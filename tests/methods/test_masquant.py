"""MASQuant and its cross-modal compensation, against the paper's formulas in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qe_dist.core.batch import IMAGE, TEXT
from qe_dist.core.errors import ConfigError
from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import Budget, ErrorProblem, GroupProblem
from qe_dist.methods.compensation.cross_modal import CrossModal
from qe_dist.methods.compensation.none import NoCompensation
from qe_dist.methods.compensation.qera import QERA
from qe_dist.methods.quantizers.rtn import RoundToNearest
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.recipes import load_recipe, recipe_from
from qe_dist.methods.transforms.masquant import MASQuant
from qe_dist.methods.transforms.none import NoTransform
from qe_dist.methods.transforms.smoothquant import SmoothQuant
from qe_dist.numerics.grid import dequantize, round_activations
from qe_dist.numerics.reference import linear_forward, prepare, route

WIDTH, TOKENS = 96, 400
BF16 = 2.0**-8
FULL = Budget(extra_bits=100.0)
"""More than the rank of any error."""
UNTRAINED = MASQuant(steps=0)

Problem = Callable[..., GroupProblem]


def recipe_of(transform: Any = UNTRAINED, compensation: Any = None, scheme: str = "w4a4", budget: Any = FULL) -> Recipe:
    return Recipe(Scheme.parse(scheme), transform, RoundToNearest(), compensation or CrossModal(), budget)


@pytest.fixture(scope="module")
def x(normal: Callable[..., Tensor]) -> Tensor:
    """Text is loud in the first six channels, images in the last six; images are twice as loud in all."""
    x = normal(0, TOKENS, WIDTH)
    x[0::2, :6] *= 40.0  # text, see conftest.py
    x[1::2, -6:] *= 40.0
    x[1::2] *= 2.0
    return x


@pytest.fixture(scope="module")
def problem(x: Tensor, problem_for: Problem) -> GroupProblem:
    return problem_for(recipe_of(), x)


def stacked(problem: GroupProblem) -> Tensor:
    return torch.cat(list(problem.weights.values())).double()


def after_rounding(problem: GroupProblem, transform: Any, budget: Budget = FULL) -> ErrorProblem:
    moved = transform.fit(problem)
    codes = {n: RoundToNearest().fit(w, moved.stats, moved.scheme) for n, w in moved.weights.items()}
    errors = {n: w - dequantize(codes[n].codes, codes[n].scale) for n, w in moved.weights.items()}
    return ErrorProblem(moved, errors, budget)


def test_the_first_scales_are_those_of_the_paper(problem: GroupProblem, x: Tensor) -> None:
    """sqrt(max|x_m| / max|W|)."""
    scale = UNTRAINED.fit(problem).input_scale.double()
    weight = stacked(problem).abs().amax(dim=0)
    wanted = torch.stack([(x[m::2].double().abs().amax(dim=0) / weight).sqrt() for m in (TEXT, IMAGE)])
    assert torch.allclose(scale, wanted, rtol=BF16)


def test_the_recipe_is_that_of_the_authors_scripts() -> None:
    recipe = load_recipe("masquant-w4a6")
    assert (recipe.transform, recipe.compensation) == (MASQuant(), CrossModal())
    assert recipe.budget == Budget(ratio=0.05)


def test_what_other_linears_of_the_block_make_is_neither_smoothed_nor_repaired(problem: GroupProblem) -> None:
    """The input of down."""
    down = replace(problem, group=replace(problem.group, producers=("gate", "up")))
    group = recipe_of(MASQuant()).fit(down)
    plain = replace(recipe_of(NoTransform()), compensation=NoCompensation()).fit(down)
    assert not group.input.by_modality
    assert group.input.input_scale is None
    for name, linear in group.linears.items():
        assert torch.equal(linear.codes, plain.linears[name].codes)
        assert linear.expert_up is None


@pytest.mark.parametrize("transform", [UNTRAINED, MASQuant(steps=16)])
@pytest.mark.parametrize(("scheme", "top"), [("w4a6", 31), ("w4a8", 127)])
def test_its_errors_are_those_of_the_papers_formulas(
    problem_for: Problem, x: Tensor, transform: MASQuant, scheme: str, top: int
) -> None:
    """Text: Q(X S_t^-1) Q(S_t W). Images: Q(X S_v^-1) Q(S_t W) + X S_v^-1 L1 L2. In float64, from the scales on; these
    and the steps of weights in the bf16 of storage, which adds to the error what it does to L1 and L2."""
    recipe = recipe_of(transform, scheme=scheme, budget=Budget(ratio=0.05))
    problem = problem_for(recipe, x)
    errors = recipe.fit(problem).report.error_by_modality
    left = after_rounding(problem, transform, recipe.budget)
    found = CrossModal().fit(left)
    scale = left.problem.input_scale.double()
    weight = stacked(problem)
    steps = ((weight * scale[TEXT]).abs().amax(dim=1, keepdim=True) / 7.5).bfloat16().double()
    rounded = torch.round(weight * scale[TEXT] / steps).clamp(-8, 7) * steps
    images = x[1::2].double() / scale[IMAGE]
    values, vectors = torch.linalg.eigh(images.T @ images)
    whiten = (vectors * values.sqrt()).T
    u, s, v = torch.linalg.svd(whiten @ (weight * scale[IMAGE] - rounded).T, full_matrices=False)
    paper = torch.linalg.solve(whiten, u[:, :32]) @ (s[:32, None] * v[:32])  # at least 32
    ours = (found.experts.up[0] @ found.experts.down[0]).double().T

    def error(modality: int, repair: Tensor) -> float:
        wanted, tokens = x[modality::2].double() @ weight.T, x[modality::2].double() / scale[modality]
        grid = tokens.abs().amax(dim=1, keepdim=True) / top
        y = torch.round(tokens / grid) * grid @ rounded.T + tokens @ repair
        return float((y - wanted).norm() / wanted.norm())

    assert errors["text"] == pytest.approx(error(TEXT, torch.zeros_like(paper)), rel=1e-3)
    assert error(IMAGE, ours) == pytest.approx(error(IMAGE, paper), rel=1e-3)
    assert errors["image"] == pytest.approx(error(IMAGE, paper), rel=2e-2)


def test_images_that_are_only_louder_have_a_larger_scale(problem_for: Problem, planted: Any) -> None:
    """As published: the size of an image scale is that of its first value."""
    x = planted(TOKENS, WIDTH).x
    x[1::2] = 7.0 * x[0::2]
    scale = UNTRAINED.fit(problem_for(recipe_of(), x)).input_scale
    assert torch.allclose(scale[IMAGE], 7**0.5 * scale[TEXT], rtol=2.1 * BF16)


def mean_error(problem: GroupProblem, x: Tensor, scale: Tensor, modality: int) -> float:
    """||Q(X_m / s) Q(s W)^T - X_m W^T||_1 / size at w4a8, in float64."""
    weight, tokens = stacked(problem) * scale, x[modality::2].double() / scale
    steps = (weight.abs().amax(dim=1, keepdim=True) / 7.5).bfloat16().double()
    rounded = torch.round(weight / steps).clamp(-8, 7) * steps
    grids = tokens.abs().amax(dim=1, keepdim=True) / 127
    wrong = (torch.round(tokens / grids) * grids) @ rounded.T - x[modality::2].double() @ stacked(problem).T
    return float(wrong.abs().mean())


@pytest.mark.parametrize("modality", [TEXT, IMAGE])
def test_training_lowers_the_absolute_error_of_each_modality(
    planted: Callable[..., Any], problem_for: Problem, modality: int
) -> None:
    x = planted(TOKENS, WIDTH).x
    problem = problem_for(recipe_of(scheme="w4a8"), x)
    before, after = (t.fit(problem).input_scale[modality].double() for t in (UNTRAINED, MASQuant()))
    assert mean_error(problem, x, after, modality) < 0.9 * mean_error(problem, x, before, modality)


def test_training_that_does_not_help_is_dropped(problem: GroupProblem) -> None:
    wild = MASQuant(steps=3, lr=0.99)
    assert torch.equal(wild.fit(problem).input_scale[TEXT], UNTRAINED.fit(problem).input_scale[TEXT])


@pytest.mark.parametrize("transform", [NoTransform(), SmoothQuant(), UNTRAINED, MASQuant(steps=4)])
def test_the_error_of_a_modality_is_what_its_tokens_miss(problem: GroupProblem, x: Tensor, transform: Any) -> None:
    """x / s_m (Q(W) + E_m)^T is x W^T, for every transform."""
    left = after_rounding(problem, transform)
    scale = left.problem.input_scale
    rounded = torch.cat([w - e for w, e in zip(left.problem.weights.values(), left.errors.values(), strict=True)])
    for modality in (TEXT, IMAGE):
        own = torch.ones(WIDTH) if scale is None else scale[modality if len(scale) > 1 else 0]
        tokens = x[modality::2].double()
        found = tokens / own.double() @ (rounded.double() + left.error_of(modality).double()).T
        assert (found - tokens @ stacked(problem).T).abs().max() < 1e-4  # float32


@pytest.mark.parametrize("transform", [SmoothQuant(), UNTRAINED, MASQuant(steps=4)])
@pytest.mark.parametrize("factor_bits", [8, 16])
def test_with_full_rank_images_get_the_full_precision_function(
    problem_for: Problem, x: Tensor, transform: Any, factor_bits: int
) -> None:
    """But for the storage of the factors; text tokens get RTN."""
    recipe = recipe_of(transform, scheme="w3a16", budget=Budget(extra_bits=100.0, factor_bits=factor_bits))
    problem = problem_for(recipe, x)
    group = recipe.fit(problem)
    assert group.report.error_by_modality["image"] < {8: 4, 16: 1}[factor_bits] * BF16
    assert group.report.error_by_modality["text"] > 20 * BF16
    scale = group.input.input_scale[TEXT].float()
    for name, linear in group.linears.items():
        plain = RoundToNearest().fit(problem.weights[name] * scale, problem.stats, recipe.scheme)
        assert torch.equal(linear.codes, plain.codes)


@given(rank=st.integers(1, 12), seed=st.integers(0, 3))
def test_the_repair_is_that_of_theorem_2(problem: GroupProblem, x: Tensor, rank: int, seed: int) -> None:
    """Against the paper's construction: T = (P Lambda^1/2)^T, SVD(T dW) = U S V, L1 = T^-1 U_r, L2 = S_r V_r."""
    left = after_rounding(problem, UNTRAINED)
    left = replace(left, budget=Budget(rank=rank * 16, capped=True))  # 16 of 1536 channels is one of 96
    correction = CrossModal().fit(left)
    assert correction.experts.down.shape == (1, rank, WIDTH)
    error = left.error_of(IMAGE).double()
    tokens = x[1::2].double() / left.problem.input_scale[IMAGE].double()
    values, vectors = torch.linalg.eigh(tokens.T @ tokens)
    whiten = (vectors * values.sqrt()).T
    u, s, v = torch.linalg.svd(whiten @ error.T, full_matrices=False)
    paper = torch.linalg.solve(whiten, u[:, :rank]) @ (s[:rank, None] * v[:rank])
    found = (correction.experts.up[0] @ correction.experts.down[0]).double().T
    smallest = (tokens @ (error.T - paper)).norm()
    assert smallest == pytest.approx(float(s[rank:].norm()), rel=1e-6)
    assert (tokens @ (error.T - found)).norm() <= smallest * (1 + 1e-3)  # a few steps of float32 iteration
    draw = torch.Generator().manual_seed(seed)
    other = found + 1e-2 * error.norm() * torch.randn(WIDTH, 1, generator=draw).double() * v[0] / WIDTH
    assert (tokens @ (error.T - other)).norm() > smallest


def test_text_tokens_get_nothing(problem: GroupProblem, x: Tensor) -> None:
    group = recipe_of(scheme="w4a4").fit(problem)
    modality = (torch.arange(TOKENS) % 2).to(torch.int8)
    assert group.input.router is None
    assert group.input.num_experts == 1
    expert = route(group.input, None, modality)
    ready = prepare(group.input, x, expert, Scheme(4, 4), modality)
    for linear in group.linears.values():
        bare = linear_forward(replace(linear, expert_up=None), ready)
        repaired = linear_forward(linear, ready)
        assert torch.equal(repaired[0::2], bare[0::2])
        assert not torch.isclose(repaired[1::2], bare[1::2]).all()


def test_theorem_1_what_the_weaker_modality_pays_for_one_scale(
    problem_for: Problem, normal: Callable[..., Tensor]
) -> None:
    """Images are alpha_c times louder in channel c. One scale for both goes with the square root of their range: the
    SQNR of text falls, by mean(1 / alpha) / max(1 / alpha) if one grid serves all tokens; that of images stays."""
    alpha = 1 + 20 * normal(1, WIDTH).abs()
    x = normal(0, TOKENS, WIDTH).clamp(-2.0, 2.0)
    x[1::2] *= alpha
    found = {}
    for transform in (UNTRAINED, SmoothQuant()):
        sample = transform.fit(problem_for(recipe_of(), x)).stats.sample
        wrong = (round_activations(sample.x, Scheme(4, 6)) - sample.x).square().sum(dim=1)
        sqnr = 10 * torch.log10(sample.x.square().sum(dim=1) / wrong)
        found[type(transform)] = [float(sqnr[sample.modality == m].mean()) for m in (TEXT, IMAGE)]
    (text, image), (text_of_both, image_of_both) = found[MASQuant], found[SmoothQuant]
    predicted = 10 * float(torch.log10((1 / alpha).mean() / (1 / alpha).max()))
    assert predicted < text_of_both - text < -3  # dB; a token's own grid spares it some
    assert image_of_both == pytest.approx(image, abs=0.1)


def test_the_repair_makes_up_for_the_broken_function(problem_for: Problem, x: Tensor) -> None:
    group = recipe_of(scheme="w4a16", budget=Budget(rank=256, capped=True)).fit(problem_for(recipe_of(), x))
    none = replace(recipe_of(scheme="w4a16"), compensation=NothingForImages())
    broken = none.fit(problem_for(recipe_of(), x))
    assert broken.report.error_by_modality["image"] > 0.3
    assert group.report.error_by_modality["image"] < 0.5 * broken.report.error_by_modality["image"]
    assert group.report.error_by_modality["text"] == broken.report.error_by_modality["text"]


class NothingForImages(NoCompensation):
    """What no recipe may have."""

    by_modality = True


def test_without_a_sound_image_token_the_text_scale_serves_both(problem_for: Problem, x: Tensor) -> None:
    sick = x.clone()
    sick[1::2, 0] = torch.nan
    group = recipe_of(MASQuant(steps=8)).fit(problem_for(recipe_of(), sick))
    assert torch.allclose(group.input.input_scale[IMAGE], group.input.input_scale[TEXT], rtol=2.1 * BF16)
    assert group.input.num_experts == 0
    assert [note for note in group.report.fallbacks if "left out" not in note] == []


def test_a_channel_that_images_do_not_use_keeps_the_scale_of_text(problem_for: Problem, x: Tensor) -> None:
    silent = x.clone()
    silent[1::2, 3] = 0.0
    first = UNTRAINED.fit(problem_for(recipe_of(), x)).input_scale
    moved = UNTRAINED.fit(problem_for(recipe_of(), silent))
    weight = stacked(moved).abs().amax(dim=0) / moved.input_scale[TEXT].double()
    own = (silent.double().abs().amax(dim=0) / weight).sqrt()
    assert moved.input_scale[IMAGE, 3] == pytest.approx(float(first[TEXT, 3]), rel=2 * BF16)
    assert moved.input_scale[IMAGE, -1] == pytest.approx(float(own[-1]), rel=2 * BF16)


@pytest.mark.parametrize("compensation", ["none", "aser", "qera", "quant_experts"])
def test_masquant_goes_with_cross_modal_only(compensation: str) -> None:
    content = {"scheme": "w4a8", "transform": {"name": "masquant"}, "compensation": {"name": compensation}}
    with pytest.raises(ConfigError, match=rf"transform masquant and compensation {compensation}.*cross_modal.*mbq"):
        recipe_from(content)
    with pytest.raises(ConfigError, match="do not go together"):
        Recipe(Scheme(4, 8), MASQuant(), RoundToNearest(), QERA())


@pytest.mark.parametrize("setting", [{"steps": -1}, {"tokens": 0}, {"lr": 0.0}, {"lr": float("nan")}])
def test_impossible_settings_are_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(setting))}"):
        MASQuant(**setting)
