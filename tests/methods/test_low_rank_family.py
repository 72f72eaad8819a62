"""LQER, L2QER, QERA and ASER against an SVD in float64, and the orderings that their papers report."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import Budget, Compensation, ErrorProblem, GroupProblem
from qe_dist.methods.compensation.aser import ASER
from qe_dist.methods.compensation.lqer import LQER
from qe_dist.methods.compensation.qera import QERA
from qe_dist.methods.quantizers.rtn import RoundToNearest
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.transforms.none import NoTransform
from qe_dist.methods.transforms.outlier_smoothing import OutlierSmoothing
from qe_dist.numerics.grid import dequantize
from qe_dist.numerics.lowrank import gram_product, low_rank

WIDTH, TOKENS, RANK = 96, 600, 6

Build = Callable[..., GroupProblem]
Normal = Callable[..., Tensor]

MEMBERS = {
    "lqer": LQER(metric="identity"),
    "l2qer": LQER(metric="mean_abs"),
    "qera, diagonal": QERA(metric="diagonal"),
    "qera, exact": QERA(metric="exact"),
}


@pytest.fixture(scope="module")
def x(normal: Normal) -> Tensor:
    """Strongly correlated channels, as activations are, of sizes over two orders of magnitude."""
    mixed = normal(0, TOKENS, WIDTH) @ (torch.logspace(0, -2, WIDTH)[:, None] * normal(1, WIDTH, WIDTH))
    return mixed * torch.logspace(-1, 1, WIDTH)[torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2))]


@pytest.fixture(scope="module")
def rounded(x: Tensor, problem_for: Build) -> ErrorProblem:
    """What rounding to three bits leaves, and a budget of rank 6 (96 of 1536 channels)."""
    recipe = Recipe(Scheme(3), NoTransform(), RoundToNearest(), QERA())
    problem = problem_for(recipe, x)
    errors = {}
    for name, weight in problem.weights.items():
        codes = RoundToNearest().fit(weight, problem.stats, problem.scheme)
        errors[name] = weight - dequantize(codes.codes, codes.scale)
    return ErrorProblem(problem, errors, Budget(rank=96, capped=True))


def repair_of(compensation: Compensation, problem: ErrorProblem) -> Tensor:
    c = compensation.fit(problem)
    assert c.shared.down.shape == (RANK, WIDTH)
    return c.shared.up.double() @ c.shared.down.double()


def by_svd(error: Tensor, s: Tensor, rank: int = RANK) -> Tensor:
    """[E S]_r S^-1, as the papers write it."""
    u, sigma, vt = torch.linalg.svd(error @ s, full_matrices=False)
    return torch.linalg.solve(s, u[:, :rank] * sigma[:rank] @ vt[:rank], left=False)


def lost(error: Tensor, repair: Tensor, x: Tensor) -> float:
    """Of the outputs, in the true metric."""
    return float((x.double() @ (error - repair).T).norm())


def test_each_adapter_is_the_whitened_svd_of_its_paper(rounded: ErrorProblem, x: Tensor) -> None:
    """Eight steps of subspace iteration come within half a percent of the best error in the method's own metric."""
    error, x = rounded.stacked.double(), x.double()
    factors = {
        "lqer": torch.eye(WIDTH).double(),
        "l2qer": x.abs().mean(dim=0).diag(),
        "qera, diagonal": x.square().mean(dim=0).sqrt().diag(),
        "qera, exact": torch.linalg.cholesky(x.T @ x / TOKENS),
    }
    for name, s in factors.items():
        best = by_svd(error, s)
        own = (error - repair_of(MEMBERS[name], rounded)) @ s
        assert ((error - best) @ s).norm() <= own.norm() * (1 + 1e-5)
        assert own.norm() <= 1.005 * ((error - best) @ s).norm()


def test_cholesky_eigenvectors_and_square_root_of_the_gram_give_one_adapter(normal: Normal, x: Tensor) -> None:
    """ASER, EoRA and QERA-exact differ in conditioning only; ours is all three."""
    x = x.double()
    gram = x.T @ x
    values, vectors = torch.linalg.eigh(gram)
    error = normal(3, 40, WIDTH).double()
    u, _, vt = torch.linalg.svd(error, full_matrices=False)
    error = u * torch.logspace(0, -6, 40).double() @ vt  # decays fast: one optimum, well apart from the others
    forms = {
        "ASER": torch.linalg.cholesky(gram),
        "EoRA": vectors * values.sqrt(),
        "QERA": vectors * values.sqrt() @ vectors.T,
    }
    up, down = low_rank(error, gram_product(gram), RANK)
    for s in forms.values():
        assert lost(up @ down, by_svd(error, s), x) < 1e-6 * lost(error, torch.zeros_like(error), x)


def test_the_more_a_metric_knows_the_less_is_lost(rounded: ErrorProblem, x: Tensor) -> None:
    """Whitened <= diagonal <= plain SVD, where channels are correlated and of different sizes (QERA, table 3)."""
    error = rounded.stacked.double()
    left = {name: lost(error, repair_of(member, rounded), x) for name, member in MEMBERS.items()}
    nothing = lost(error, torch.zeros_like(error), x)
    assert left["qera, exact"] < 0.9 * left["qera, diagonal"]
    assert left["qera, diagonal"] < 0.9 * left["lqer"]
    assert left["l2qer"] < 0.9 * left["lqer"]
    assert left["lqer"] < nothing


def test_uncorrelated_channels_need_no_more_than_their_sizes(normal: Normal, problem_for: Build) -> None:
    """There the diagonal is the whole Gram matrix, but for the noise of a sample."""
    loud = normal(4, TOKENS, WIDTH) * torch.logspace(-1, 1, WIDTH)
    problem = problem_for(Recipe(Scheme(3), NoTransform(), RoundToNearest(), QERA()), loud)
    flat = torch.cat(list(problem.weights.values())).double()
    problem = ErrorProblem(problem, problem.weights, Budget(rank=96, capped=True))
    exact, diagonal = (lost(flat, repair_of(QERA(metric=m), problem), loud) for m in ("exact", "diagonal"))
    assert exact <= diagonal < 1.05 * exact


def test_lqer_needs_no_gram_matrix() -> None:
    assert not LQER().needs().gram


def test_a_channel_that_is_never_used_is_no_trouble(normal: Normal, x: Tensor, problem_for: Build) -> None:
    silent = x.index_fill(1, torch.tensor([4, 5]), 0.0)
    recipe = Recipe(Scheme(3), NoTransform(), RoundToNearest(), LQER(), Budget(rank=96, capped=True))
    group = recipe.fit(problem_for(recipe, silent))
    assert group.report.fallbacks == ()
    assert group.report.error < group.report.rounding_error


@pytest.fixture(params=["frequency", "mean"])
def smoothed_aser(request: pytest.FixtureRequest) -> Recipe:
    """64 of 1536 channels is 4 of 96."""
    transform, aser = OutlierSmoothing(k=64, rank_by=request.param), ASER(k=64, rank_by=request.param)
    return Recipe(Scheme(4, 6), transform, RoundToNearest(), aser, Budget(rank=96, capped=True))


def test_aser_exempts_the_channels_of_the_largest_means(x: Tensor, problem_for: Build) -> None:
    aser = ASER(k=64)
    problem = problem_for(Recipe(Scheme(4, 6), NoTransform(), RoundToNearest(), aser), x)
    weight = torch.cat(list(problem.weights.values())).double()
    score = [float(x[:, c].double().abs().mean() * weight[:, c].abs().mean()) for c in range(WIDTH)]
    assert aser.exempt(problem).tolist() == sorted(range(WIDTH), key=lambda c: -score[c])[:4]


def test_aser_exempts_the_channels_that_it_smooths(smoothed_aser: Recipe, x: Tensor, problem_for: Build) -> None:
    problem = problem_for(smoothed_aser, x)
    moved = smoothed_aser.transform.fit(problem)
    exempt = smoothed_aser.compensation.exempt(moved)
    assert set((moved.input_scale[0] > 1).nonzero().flatten().tolist()) <= set(exempt.tolist())
    assert torch.equal(exempt, smoothed_aser.compensation.exempt(problem))
    assert (moved.input_scale[0] > 1).sum() == 3  # the smallest of the four stays


def test_aser_carries_the_columns_that_it_exempts(smoothed_aser: Recipe, x: Tensor, problem_for: Build) -> None:
    problem = problem_for(smoothed_aser, x)
    group = smoothed_aser.fit(problem)
    exempt = smoothed_aser.compensation.exempt(problem)
    assert group.report.fallbacks == ()
    assert not any(linear.codes[:, exempt].any() for linear in group.linears.values())
    assert group.report.error < 0.2 < group.report.rounding_error


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
@pytest.mark.parametrize("extra_bits", [0.05, 0.6, 1.0, 2.0, 4.0])
def test_under_a_byte_budget_exempting_never_does_harm(
    smoothed_aser: Recipe, x: Tensor, problem_for: Build, extra_bits: float, factor_bits: int
) -> None:
    """No more columns than ranks, and none where whole columns are too much for these."""
    aser = replace(smoothed_aser, scheme=Scheme(4), budget=Budget(extra_bits=extra_bits, factor_bits=factor_bits))
    problem = problem_for(aser, x)
    fitted, without = aser.fit(problem), replace(aser, compensation=QERA()).fit(problem)
    assert fitted.report.error <= without.report.error * (1 + 1e-3)
    rank = 0 if fitted.input.shared_down is None else len(fitted.input.shared_down.dense)
    codes = torch.cat([linear.codes for linear in fitted.linears.values()])
    exempt = aser.compensation.exempt(problem)
    assert int((codes[:, exempt] == 0).all(dim=0).sum()) <= rank


def test_a_large_byte_budget_carries_the_columns(smoothed_aser: Recipe, x: Tensor, problem_for: Build) -> None:
    problem = problem_for(smoothed_aser, x)
    exempt = smoothed_aser.compensation.exempt(problem)
    large, small = (replace(smoothed_aser, budget=Budget(extra_bits=b)).fit(problem) for b in (4.0, 0.05))
    assert not any(linear.codes[:, exempt].any() for linear in large.linears.values())
    assert all(linear.codes[:, exempt].any() for linear in small.linears.values())


@pytest.mark.parametrize(("scheme", "top"), [("w4a6", 31), ("w4a8", 127)])
def test_the_error_of_aser_is_that_of_the_papers_formulas(x: Tensor, problem_for: Build, scheme: str, top: int) -> None:
    """Outliers by mean|x| mean|W|, m = mean|x| / its least, Q(W_s), and the whitened SVD of all that is missing."""
    transform, budget = OutlierSmoothing(k=64, rank_by="mean"), Budget(rank=6)
    recipe = Recipe(Scheme.parse(scheme), transform, RoundToNearest(), ASER(k=64), budget)
    problem = problem_for(recipe, x)
    tokens = x.double()
    weight = torch.cat(list(problem.weights.values())).double()
    mean = tokens.abs().mean(dim=0)
    outliers = (mean * weight.abs().mean(dim=0)).argsort(descending=True)[:4]
    m = torch.ones(WIDTH).double().index_copy(0, outliers, mean[outliers] / mean[outliers].min()).bfloat16().double()
    smooth, exact = tokens / m, tokens @ weight.T
    left = (weight * m).index_fill(1, outliers, 0.0)
    step = (left.abs().amax(dim=1, keepdim=True) / 7.5).bfloat16().double()
    rounded = torch.round(left / step).clamp(-8, 7) * step
    repair = by_svd(weight * m - rounded, torch.linalg.cholesky(smooth.T @ smooth), rank=6)
    grid = smooth.abs().amax(dim=1, keepdim=True) / top
    y = torch.round(smooth / grid) * grid @ rounded.T + smooth @ repair.T
    assert recipe.fit(problem).report.error == pytest.approx(float((y - exact).norm() / exact.norm()), rel=1e-3)


def test_how_often_a_channel_matters_is_counted_only_where_it_is_asked() -> None:
    assert ASER(k=5, rank_by="frequency").needs().top_channels == {5}
    assert OutlierSmoothing(k=5).needs().top_channels == {5}
    assert ASER().needs().top_channels == set()
    assert OutlierSmoothing(rank_by="mean").needs().top_channels == set()
