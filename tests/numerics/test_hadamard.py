"""Hadamard matrices are what their definition says, and what is built of them is orthogonal for every width."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qe_dist.numerics import hadamard
from qe_dist.numerics.hadamard import (
    Mixing,
    Orthogonal,
    bands_of,
    block_size,
    fused,
    has_paley,
    online_factors,
    paley,
    randomized_hadamard,
    rotate_blocks,
    rotate_weight,
    sylvester,
    unit,
)

QWEN = [896, 1536, 2048, 3584, 5120, 8192, 80, 96, 128]
"""Widths of Qwen2-VL (1536, 3584, 8192; heads of 128) and its relatives."""
BUNDLED = [256, 32]


def rotation(width: int, seed: int = 0) -> Orthogonal:
    return randomized_hadamard(torch.zeros(width, dtype=torch.int64), torch.Generator().manual_seed(seed))


def explicit(r: Orthogonal) -> torch.Tensor:
    """R as a matrix, by the definition: one mixing after the other, each a Kronecker product on its channels."""
    width = len(r.bands)
    matrix = torch.eye(width, dtype=torch.float64)
    for mix in r.mixings:
        kronecker = torch.ones(1, 1, dtype=torch.float64)
        for factor in mix.factors:
            kronecker = torch.kron(kronecker, factor)
        step = torch.eye(width, dtype=torch.float64)
        channels = torch.arange(width)[mix.channels]
        step[channels[:, None], channels] = mix.signs.diag() @ kronecker
        matrix = matrix @ step
    return matrix


def is_hadamard(h: torch.Tensor) -> bool:
    n = len(h)
    return bool((h.abs() == 1).all()) and torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64, 128])
def test_sylvester(order):
    assert sylvester(order).shape == (order, order)
    assert is_hadamard(sylvester(order))


def test_paley_wherever_it_says_so():
    orders = [n for n in range(1, 129) if has_paley(n)]
    assert {4, 12, 20, 28, 36, 44, 60, 84, 108} <= set(orders)  # 12 and 44 by the first construction, 28 by the second
    for order in orders:
        assert paley(order).shape == (order, order)
        assert is_hadamard(paley(order)), order


@pytest.mark.parametrize("width", QWEN + BUNDLED)
def test_every_channel_of_a_real_model_goes_to_all_in_equal_parts(width):
    rows = rotation(width)(torch.eye(width, dtype=torch.float64)[:: max(1, width // 16)])
    assert torch.allclose(rows.abs(), torch.full_like(rows, width**-0.5), rtol=1e-12)
    assert 0.3 < (rows > 0).double().mean() < 0.7


@pytest.mark.parametrize("width", QWEN + BUNDLED + [1, 3, 7, 52, 3583, 8181])
def test_lengths_and_angles_stay(width):
    x = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = rotation(width)(x)
    assert torch.allclose(y @ y.T, x @ x.T, rtol=0, atol=1e-11 * width)


@given(st.integers(1, 140), st.integers(0, 3), st.integers(1, 3))
def test_any_width_gives_the_orthogonal_matrix_of_the_definition(width, seed, blocks):
    r = rotation(width, seed)
    matrix = explicit(r)
    assert torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    x = torch.randn(4, blocks * width, generator=torch.Generator().manual_seed(seed)).double()
    assert torch.allclose(r(x), x @ torch.block_diag(*[matrix] * blocks), atol=1e-12)


@pytest.mark.parametrize("width", [52, 92, 213, 999])
def test_a_width_without_hadamard_matrix_is_mixed_nearly_as_evenly(width):
    """No entry is far above the usual size: the largest of n Gaussian numbers is some sqrt(2 log n)."""
    matrix = rotation(width)(torch.eye(width, dtype=torch.float64))
    assert matrix.abs().max() < 2 * math.sqrt(2 * math.log(width**2) / width)
    assert matrix.square().sum(dim=0).allclose(torch.ones(width, dtype=torch.float64))


def test_the_seed_decides():
    a, b, c = (rotation(96, seed)(torch.eye(96).double()) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_bands_are_octaves_of_the_gains_about_their_median():
    gains = torch.tensor([[1.0, 1.9, 0.6, 50.0, 60.0, -1.0, 0.01], [1.0, 1.9, 0.6, 50.0, 40.0, 1.0, 0.01]])
    assert bands_of(gains, octaves=2.0).tolist() == [1, 1, 1, 2, 2, 1, 0]
    assert bands_of(gains, octaves=100.0).tolist() == [0] * 7


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 3))
def test_bands_are_not_mixed_and_keep_their_common_gain(labels, seed):
    bands = torch.tensor(labels).unique(return_inverse=True)[1]
    r = randomized_hadamard(bands, torch.Generator().manual_seed(seed))
    matrix = r(torch.eye(len(bands), dtype=torch.float64))
    assert (matrix[bands[:, None] != bands] == 0).all()
    assert torch.allclose(matrix @ matrix.T, torch.eye(len(bands), dtype=torch.float64), atol=1e-12)
    gain = torch.randn(len(bands), generator=torch.Generator().manual_seed(seed)).abs() + 0.1
    kept = r.common_gain(gain)
    for band in bands.unique():
        mean = math.prod(gain[bands == band].tolist()) ** (1 / int((bands == band).sum()))
        assert torch.allclose(kept[bands == band], torch.tensor(mean, dtype=torch.float64), rtol=1e-6)
    assert torch.allclose(kept.diag() @ matrix, matrix @ kept.diag(), atol=1e-12)


def test_a_gain_of_zero_can_be_divided_by_what_it_has_in_common():
    kept = rotation(8).common_gain(torch.zeros(8))
    assert (kept > 0).all()
    assert torch.isfinite(kept).all()


@given(st.integers(1, 40), st.sampled_from([12, 16, 24, 52]), st.sampled_from([1, 3]), st.booleans(), st.booleans())
def test_fused_is_the_product_of_the_matrices(rows, width, heads, on_rows, on_columns):
    random = torch.Generator().manual_seed(rows)
    left, right = rotation(rows, 1), rotation(width // heads if width % heads == 0 else width, 2)
    weight = torch.randn(rows, width, generator=random).bfloat16()
    gain = torch.rand(width, generator=random) + 0.5
    expected = weight.double() * gain
    if on_columns:
        expected = expected @ torch.block_diag(*[explicit(right)] * (width // len(right.bands)))
    if on_rows:
        expected = explicit(left).T @ expected
    found = fused(weight, left if on_rows else None, right if on_columns else None, gain, torch.float64)
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, atol=1e-12)


def test_fused_rounds_once_and_in_strips_of_any_size(monkeypatch):
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    left, right = rotation(48), rotation(32)
    exact = fused(weight, left, right, dtype=torch.float64)
    assert torch.equal(fused(weight, left, right), exact.float())
    assert torch.equal(fused(weight, left, right, dtype=torch.bfloat16), exact.bfloat16())
    monkeypatch.setattr(hadamard, "STRIP", 1)
    assert torch.allclose(fused(weight, left, right, dtype=torch.float64), exact, rtol=0, atol=1e-13)


def kronecker(factors) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        matrix = torch.kron(matrix, factor.double())
    return matrix


@pytest.mark.parametrize(
    ("width", "factors"),
    [
        (1536, (12, 128)), (576, (12, 12, 4)), (8960, (20, 28, 16)), (18944, (148, 128)), (29568, (12, 28, 44, 2)),
        (3712, (128,)), (29696, (8, 128)), (52, (4,)), (96, (12, 8)), (213, ()), (1, ()),
    ],
)  # fmt: skip
def test_at_run_time_the_largest_product_of_known_orders_that_divides_the_width(width, factors):
    found = online_factors(width)
    assert tuple(len(f) for f in found) == factors
    assert all(is_hadamard(f.double()) for f in found)
    assert width % block_size(found) == 0


@given(st.integers(1, 60), st.integers(1, 3), st.sampled_from([torch.float32, torch.float64]))
def test_the_transform_is_the_product_with_the_matrix_block_by_block(width, blocks, dtype):
    random = torch.Generator().manual_seed(width)
    factors = online_factors(width)
    h = kronecker(factors)
    assert torch.equal(h @ h.T, len(h) * torch.eye(len(h), dtype=torch.float64))
    x, weight = (torch.randn(5, blocks * width, generator=random, dtype=torch.float64) for _ in range(2))
    matrix = torch.block_diag(*[h / len(h) ** 0.5] * (blocks * width // len(h)))
    found = rotate_blocks(x.to(dtype), unit(factors, dtype))
    assert found.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.allclose(found.double(), x @ matrix, rtol=0, atol=tolerance * float(x.abs().max()))
    turned = rotate_weight(weight, factors)
    assert torch.allclose(turned, weight @ matrix, rtol=0, atol=1e-12)
    assert torch.allclose(rotate_blocks(x, unit(factors)) @ turned.T, x @ weight.T, rtol=0, atol=1e-11)
    assert torch.equal(rotate_weight(weight.float(), factors), rotate_weight(weight.float().double(), factors).float())


def test_a_mixing_costs_its_factors_and_not_their_product():
    (mix,) = rotation(8192).mixings
    assert isinstance(mix, Mixing)
    assert sum(len(f) for f in mix.factors) <= 2 * hadamard.LARGEST_FACTOR
