"""The low-rank repair against a float64 SVD: with S S^T = G, the best error of rank r is the tail of E S.

S = X^T here, so ||(E - L) X^T||_F can be measured directly, also where G is singular and has no inverse.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qe_dist.core.errors import NumericalError
from qe_dist.numerics import lowrank
from qe_dist.numerics.lowrank import (
    PAPER_WIDTH,
    capped,
    cholesky_qr,
    fit_up,
    gram_product,
    low_rank,
    token_product,
)

Normal = Callable[..., Tensor]

SLACK = 1.01
"""Eight steps of subspace iteration on a spectrum without any gap, the worst case, end within a percent."""


def best_error(error: Tensor, x: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(error.double() @ x.double().T)[rank:].square().sum().sqrt())


def error_of(error: Tensor, x: Tensor, up: Tensor, down: Tensor) -> float:
    left = error.double() - up.double() @ down.double()
    return float((left @ x.double().T).norm())


@pytest.fixture
def inputs(normal: Normal) -> Callable[..., Tensor]:
    """Correlated channels whose directions decay over three orders of magnitude, as activations do."""

    def draw(seed: int, tokens: int, width: int) -> Tensor:
        return normal(seed, tokens, width) @ (torch.logspace(0, -3, width)[:, None] * normal(seed + 1, width, width))

    return draw


@pytest.mark.parametrize(
    ("outputs", "width", "tokens"),
    [(48, 64, 400), (96, 32, 400), (32, 96, 400), (48, 64, 20), (5, 64, 400), (64, 64, 1)],
    ids=["square", "tall", "wide", "fewer tokens than width", "fewer outputs than the block", "one token"],
)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_error_is_the_tail_of_the_singular_values(
    normal: Normal, inputs: Callable[..., Tensor], outputs: int, width: int, tokens: int, rank: int
) -> None:
    error, x = normal(0, outputs, width), inputs(1, tokens, width)
    best = best_error(error, x, rank)
    rounding = 1e-5 * best_error(error, x, 0)  # float32
    for times_gram in (token_product(x), gram_product(x.T @ x)):
        found = error_of(error, x, *low_rank(error, times_gram, rank))
        assert best - rounding <= found <= SLACK * best + rounding


def test_a_flat_spectrum_is_the_worst_case(normal: Normal) -> None:
    error, x = normal(2, 64, 64), normal(3, 500, 64)
    for rank in (2, 8, 32):
        assert error_of(error, x, *low_rank(error, token_product(x), rank)) <= SLACK * best_error(error, x, rank)


def test_it_equals_the_whitened_svd(normal: Normal) -> None:
    """[E S]_r S^-1 (ASER, QERA-exact), here with the Cholesky factor of G."""
    error, x = normal(4, 24, 32).double(), normal(5, 300, 32).double()
    error[:, :3] *= 30  # a gap in the spectrum, so that the optimum is one and not many
    s = torch.linalg.cholesky(x.T @ x)
    u, sigma, vt = torch.linalg.svd(error @ s)
    whitened = torch.linalg.solve(s, (u[:, :3] * sigma[:3] @ vt[:3]), left=False)
    up, down = low_rank(error, gram_product(x.T @ x), 3)
    assert (up @ down - whitened).norm() < 1e-6 * whitened.norm()  # the gap (about 10) to the power 16


def test_without_a_metric_it_is_the_truncated_svd(normal: Normal) -> None:
    u, _ = torch.linalg.qr(normal(6, 40, 20).double())
    v, _ = torch.linalg.qr(normal(7, 30, 20).double())
    sigma = 2.0 ** -torch.arange(20).double()
    up, down = low_rank(u * sigma @ v.T, gram_product(torch.eye(30).double()), 5)
    truncated = u[:, :5] * sigma[:5] @ v[:, :5].T
    assert (up @ down - truncated).norm() < 1e-9


def test_the_repair_never_hurts(normal: Normal) -> None:
    """It is a projection of the error, so it helps, or does nothing, for any input, seen or not."""
    error, x = normal(8, 24, 48), normal(9, 10, 48)
    up, down = low_rank(error, token_product(x), 4)
    assert (up.T @ up - torch.eye(4)).abs().max() < 1e-5
    unseen = normal(10, 100, 48)
    left = (unseen @ (error - up @ down).T).norm(dim=1)
    assert (left <= (unseen @ error.T).norm(dim=1) * (1 + 1e-5)).all()


def test_only_the_tokens_seen_count_where_the_gram_is_singular(normal: Normal) -> None:
    """With no more tokens than the rank, nothing of their error is left."""
    error, x = normal(11, 24, 48), normal(12, 4, 48)
    assert error_of(error, x, *low_rank(error, token_product(x), 4)) < 1e-5 * best_error(error, x, 0)


@pytest.mark.parametrize(("outputs", "width"), [(6, 20), (20, 6)])
def test_the_rank_is_cut_at_what_the_matrix_has(normal: Normal, outputs: int, width: int) -> None:
    error = normal(13, outputs, width)
    up, down = low_rank(error, gram_product(torch.eye(width)), 64)
    assert (up.shape, down.shape) == ((outputs, 6), (6, width))
    assert (up @ down - error).norm() < 1e-5 * error.norm()


def test_rank_zero_is_an_empty_repair(normal: Normal) -> None:
    up, down = low_rank(normal(14, 6, 20), gram_product(torch.eye(20)), 0)
    assert (up.shape, down.shape) == ((6, 0), (0, 20))


def test_where_there_is_no_error_there_is_nothing_to_repair() -> None:
    up, down = low_rank(torch.zeros(6, 20), gram_product(torch.eye(20)), 3)
    assert (up.shape, down.shape) == ((6, 3), (3, 20))
    assert not up.any()
    assert not down.any()


def test_inputs_that_are_all_zero_give_a_finite_repair(normal: Normal) -> None:
    up, down = low_rank(normal(15, 6, 20), gram_product(torch.zeros(20, 20)), 3)
    assert torch.isfinite(up).all()
    assert torch.isfinite(down).all()


@pytest.mark.parametrize("power", [-90, -70, 60])
def test_the_size_of_the_error_only_scales_the_repair(normal: Normal, power: int) -> None:
    """Powers of two, so to the bit; the squares of such errors have no place in float32."""
    error, gram = normal(16, 12, 20), torch.eye(20)
    up, down = low_rank(error, gram_product(gram), 3)
    scaled_up, scaled_down = low_rank(error * 2.0**power, gram_product(gram), 3)
    assert torch.equal(scaled_up, up)
    assert torch.equal(scaled_down, down * 2.0**power)


def test_equal_inputs_give_equal_bits(normal: Normal, same: Callable[[Any, Any], bool]) -> None:
    error, x = normal(17, 48, 64), normal(18, 100, 64)
    first = low_rank(error, token_product(x), 8)
    torch.manual_seed(1234)  # the global state has no say
    assert same(low_rank(error, token_product(x), 8), first)


class Tf32(TorchDispatchMode):
    """Products as tensor cores make them: factors with 10 bits behind the point, sums in float32."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.mm.default:
            args = tuple(((a.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for a in args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loud", [1.0, 1e4], ids=["alike", "one channel ten thousand times as loud"])
def test_ten_bits_are_enough_for_the_iteration(
    normal: Normal, inputs: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, loud: float
) -> None:
    """On a GPU the iteration uses tensor cores; every step filters what the one before rounded."""
    error, x = normal(35, 128, 96), inputs(36, 400, 96)
    x[:, 3] *= loud
    single = error_of(error, x, *low_rank(error, gram_product(x.T @ x), 32))
    monkeypatch.setattr(lowrank, "tensor_cores", Tf32)
    assert error_of(error, x, *low_rank(error, gram_product(x.T @ x), 32)) < 1.0001 * single
    monkeypatch.setattr(lowrank, "ROUGH", lowrank.STEPS)
    if loud > 1:
        assert error_of(error, x, *low_rank(error, gram_product(x.T @ x), 32)) > 1.01 * single  # so the last are not


@pytest.mark.parametrize("sizes", [1.0, 1e-20], ids=["alike", "of very different size"])
def test_columns_are_made_orthonormal_by_products_alone(normal: Normal, sizes: float) -> None:
    columns = normal(37, 200, 24) * torch.linspace(0, 1, 24).mul(math.log(sizes)).exp()
    basis = cholesky_qr(columns)
    assert (basis.T @ basis - torch.eye(24)).abs().max() < 1e-5
    wanted = torch.linalg.qr(columns.double() / columns.double().norm(dim=0)).Q
    assert (basis.double() @ (basis.double().T @ wanted) - wanted).norm() < 1e-4  # the same span


def test_columns_that_hardly_differ_are_left_to_reflections(normal: Normal) -> None:
    columns = normal(38, 200, 8)
    columns[:, 5] = columns[:, 2] + 1e-6 * columns[:, 5]
    assert cholesky_qr(columns) is None
    assert cholesky_qr(torch.zeros(20, 3)) is None


@pytest.mark.gpu
def test_a_gpu_finds_as_good_a_repair(normal: Normal, inputs: Callable[..., Tensor]) -> None:
    error, x = normal(39, 600, 400), inputs(40, 2000, 400)
    up, down = low_rank(error.cuda(), gram_product((x.T @ x).cuda()), 32)
    assert error_of(error, x, up.cpu(), down.cpu()) <= SLACK * best_error(error, x, 32)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_error_is_a_numerical_error(normal: Normal, bad: float) -> None:
    error = normal(19, 12, 20)
    error[3, 4] = bad
    with pytest.raises(NumericalError):
        low_rank(error, gram_product(torch.eye(20)), 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_a_bad_gram_matrix_is_a_numerical_error(normal: Normal, bad: float) -> None:
    gram = torch.eye(20)
    gram[3:, 3:] = bad
    with pytest.raises(NumericalError):
        low_rank(normal(20, 12, 20), gram_product(gram), 3)


def test_the_two_products_are_the_same_map(normal: Normal) -> None:
    x, v = normal(21, 30, 20).double(), normal(22, 20, 5).double()
    assert torch.allclose(token_product(x)(v), gram_product(x.T @ x)(v))


def test_an_up_matrix_is_the_least_squares_fit_on_the_inputs(normal: Normal, inputs: Callable[..., Tensor]) -> None:
    """Of (X E^T) on (X D^T), by LAPACK."""
    error, x, down = normal(27, 24, 32), inputs(28, 200, 32), normal(29, 5, 32)
    wanted = torch.linalg.lstsq(x.double() @ down.double().T, x.double() @ error.double().T).solution.T
    best = error_of(error, x, wanted, down)
    for times_gram in (token_product(x), gram_product(x.T @ x)):
        assert error_of(error, x, fit_up(error, times_gram, down), down) < (1 + 1e-4) * best


def test_an_up_matrix_fitted_to_the_best_down_matrix_is_the_best_one(normal: Normal) -> None:
    error, x = normal(30, 24, 32), normal(31, 200, 32)
    up, down = low_rank(error, token_product(x), 4)
    assert error_of(error, x, fit_up(error, token_product(x), down), down) == pytest.approx(
        error_of(error, x, up, down), rel=1e-3
    )


def test_a_rank_that_sees_nothing_repairs_nothing(normal: Normal) -> None:
    down = normal(32, 4, 20)
    down[2] = 0.0
    up = fit_up(normal(33, 6, 20), gram_product(torch.eye(20)), down)
    assert torch.isfinite(up).all()
    assert not up[:, 2].any()


def test_a_bad_gram_matrix_is_a_numerical_error_of_an_up_matrix_too(normal: Normal) -> None:
    gram = torch.eye(20)
    gram[3, 4] = math.nan
    with pytest.raises(NumericalError):
        fit_up(normal(34, 12, 20), gram_product(gram), normal(35, 3, 20))


@pytest.mark.parametrize("asked", [1, 8, 32, 64])
def test_counts_are_as_asked_on_the_widths_of_published_models(asked: int) -> None:
    assert {capped(width, asked) for width in (PAPER_WIDTH, 3584, 8192, 29568)} == {asked}


def test_counts_are_the_same_share_of_a_narrow_layer() -> None:
    assert [capped(PAPER_WIDTH // part, 32) for part in (2, 4, 16, 32)] == [16, 8, 2, 1]


def test_a_count_is_at_least_one() -> None:
    assert capped(8, 32) == 1
