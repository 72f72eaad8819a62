"""Low-rank factors are stored in bf16, or in 8 or 4 bits with a scale per row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.quantized import Factor
from qe_dist.numerics.factors import FACTOR_BITS, adapter, columns_within, even_rank, rank_within, store_factor
from qe_dist.numerics.lowrank import low_rank, token_product

Normal = Callable[..., Tensor]


@pytest.fixture(params=[(6, 40), (3, 6, 40)], ids=["matrix", "experts"])
def matrix(request: pytest.FixtureRequest, normal: Normal) -> Tensor:
    """Rows of very different size, one of them zero."""
    rows = normal(0, *request.param) * torch.logspace(-8, 2, 6)[:, None]
    rows[..., 2, :] = 0.0
    return rows


def test_16_bits_are_bf16(matrix: Tensor) -> None:
    factor = store_factor(matrix, 16)
    assert factor.scale is None
    assert torch.equal(factor.values, matrix.bfloat16())
    assert torch.equal(factor.dense, matrix.bfloat16().float())


def step_of(factor: Factor) -> Tensor:
    return factor.scale.double()[..., None]


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
def test_integers_are_within_half_a_step_of_each_row(matrix: Tensor, bits: int, top: int) -> None:
    factor = store_factor(matrix, bits)
    assert factor.scale.shape == matrix.shape[:-1]
    assert factor.scale.dtype == torch.bfloat16
    codes = factor.dense.double() / step_of(factor)
    assert (codes - codes.round()).abs().max() < 1e-5
    assert codes.abs().max() < top + 1e-5  # symmetric: -128 and -8 are left out
    error = (factor.dense.double() - matrix.double()).abs()
    assert (error <= 0.5 * (1 + 1e-4) * step_of(factor)).all()


@pytest.mark.parametrize(("bits", "top"), [(8, 126), (4, 7)])
def test_integers_use_the_whole_range(matrix: Tensor, bits: int, top: int) -> None:
    factor = store_factor(matrix, bits)
    peaks = (factor.dense.double() / step_of(factor)).abs().amax(dim=-1)
    rows = matrix.abs().amax(dim=-1) > 0
    assert (peaks[rows] >= top - 1e-5).all()  # the bf16 scale may be a little too large


def test_8_bits_are_an_int8_each(matrix: Tensor) -> None:
    values = store_factor(matrix, 8).values
    assert (values.dtype, values.shape) == (torch.int8, matrix.shape)


@given(codes=st.lists(st.lists(st.integers(-7, 7), min_size=6, max_size=6), min_size=1, max_size=5))
def test_4_bits_are_two_columns_to_a_byte(codes: list[list[int]]) -> None:
    """Column 2j in the lower half of byte j, as code + 8. With 7 in a row, the codes are the numbers themselves."""
    rows = [[7, *row, -7] for row in codes]
    factor = store_factor(torch.tensor(rows).float(), 4)
    assert factor.values.dtype == torch.uint8
    assert factor.values.tolist() == [[row[j] + 8 + 16 * (row[j + 1] + 8) for j in range(0, 8, 2)] for row in rows]
    assert factor.dense.tolist() == rows


def test_4_bits_refuse_an_odd_number_of_columns() -> None:
    with pytest.raises(ConfigError, match=r"cannot hold 5.*factor_bits = 8"):
        store_factor(torch.ones(3, 5), 4)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_zero_row_stays_zero(matrix: Tensor, bits: int) -> None:
    assert not store_factor(matrix, bits).dense[..., 2, :].any()


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_float64_is_stored_as_float32_is(matrix: Tensor, bits: int) -> None:
    """The float64 step of the ladder must write the same types."""
    factor, wide = store_factor(matrix, bits), store_factor(matrix.double(), bits)
    assert wide.values.dtype == factor.values.dtype
    assert wide.dense.dtype == torch.float32


@pytest.mark.parametrize("bits", [4, 8])
def test_rank_zero_is_stored(bits: int) -> None:
    assert store_factor(torch.zeros(0, 8), bits).dense.shape == (0, 8)


@pytest.mark.parametrize("experts", [(), (3,)])
@pytest.mark.parametrize("rank", [1, 4, 5])
def test_an_even_rank_is_the_same_repair(normal: Normal, experts: tuple[int, ...], rank: int) -> None:
    down, up = normal(1, *experts, rank, 8), normal(2, *experts, 6, rank)
    even_up, even_down = even_rank(up, down)
    assert even_up.shape[-1] == even_down.shape[-2] == rank + rank % 2
    assert torch.allclose(even_up @ even_down, up @ down)


@given(
    bits=st.floats(0, 60_000),
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 40).map(lambda n: 2 * n),
    factor_bits=st.sampled_from(FACTOR_BITS),
    copies=st.integers(1, 4),
)
def test_the_rank_is_the_largest_whose_stored_bytes_fit(
    bits: float, outputs: int, inputs: int, factor_bits: int, copies: int
) -> None:
    """Counted on factors that are really stored."""

    def stored_bits(rank: int) -> int:
        pair = (torch.ones(copies, outputs, rank), torch.ones(copies, rank, inputs))
        factors = [store_factor(matrix, factor_bits) for matrix in pair]
        tensors = [t for f in factors for t in (f.values, f.scale) if t is not None]
        return 8 * sum(t.numel() * t.element_size() for t in tensors)

    step = 2 if factor_bits == 4 else 1
    rank = rank_within(bits, outputs, inputs, factor_bits, copies)
    assert rank % step == 0
    assert rank == 0 or stored_bits(rank) <= bits
    assert stored_bits(rank + step) > bits


@given(bits=st.floats(0, 20_000), outputs=st.integers(1, 40), factor_bits=st.sampled_from(FACTOR_BITS))
def test_the_columns_are_the_most_whose_stored_bytes_fit(bits: float, outputs: int, factor_bits: int) -> None:
    """With the indices of their channels."""

    def stored_bits(count: int) -> int:
        factor = store_factor(torch.ones(outputs, count), factor_bits)
        indices = torch.zeros(count, dtype=torch.int32)
        tensors = [t for t in (factor.values, factor.scale, indices) if t is not None]
        return 8 * sum(t.numel() * t.element_size() for t in tensors)

    count = columns_within(bits, outputs, factor_bits)
    assert count % 2 == 0
    assert count == 0 or stored_bits(count) <= bits
    assert stored_bits(count + 2) > bits


def test_at_4_bits_the_up_matrix_makes_up_for_a_part_of_what_rounding_the_down_matrix_lost(normal: Normal) -> None:
    x = normal(3, 300, 64) @ (torch.logspace(0, -2, 64)[:, None] * normal(4, 64, 64))
    error = normal(5, 48, 64)

    def lost(up: Tensor, down: Tensor) -> float:
        stored = store_factor(up, 4).dense @ store_factor(down, 4).dense
        return float(((error - stored) @ x.T).norm())

    plain, fitted = low_rank(error, token_product(x), 16), adapter(error, token_product(x), 16, 4)
    assert torch.equal(fitted[1], plain[1])
    assert lost(*fitted) < 0.95 * lost(*plain)


@pytest.mark.parametrize("bits", [8, 16])
def test_above_4_bits_an_adapter_is_the_best_repair_as_it_is(
    normal: Normal, bits: int, same: Callable[[Any, Any], bool]
) -> None:
    error, x = normal(6, 12, 20), normal(7, 50, 20)
    assert same(adapter(error, token_product(x), 3, bits), low_rank(error, token_product(x), 3))
