"""Low-rank factors are stored in bf16, or in int8 with a scale per row."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qe_dist.numerics.factors import store_factor

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


def test_8_bits_are_within_half_a_step_of_each_row(matrix: Tensor) -> None:
    factor = store_factor(matrix, 8)
    assert factor.values.dtype == torch.int8
    assert factor.scale.shape == matrix.shape[:-1]
    assert factor.scale.dtype == torch.bfloat16
    assert factor.values.abs().max() <= 127  # symmetric: -128 is left out
    error = (factor.values.double() * factor.scale.double()[..., None] - matrix.double()).abs()
    assert (error <= 0.5 * (1 + 1e-4) * factor.scale.double()[..., None]).all()  # float32 quotient up to 127


def test_8_bits_use_the_whole_range(matrix: Tensor) -> None:
    peaks = store_factor(matrix, 8).values.abs().amax(dim=-1)
    rows = matrix.abs().amax(dim=-1) > 0
    assert (peaks[rows] >= 126).all()  # the bf16 scale may be a little too large


@pytest.mark.parametrize("bits", [8, 16])
def test_a_zero_row_stays_zero(matrix: Tensor, bits: int) -> None:
    assert not store_factor(matrix, bits).dense[..., 2, :].any()


@pytest.mark.parametrize("bits", [8, 16])
def test_float64_is_stored_as_float32_is(matrix: Tensor, bits: int) -> None:
    """The float64 step of the ladder must write the same types."""
    factor, wide = store_factor(matrix, bits), store_factor(matrix.double(), bits)
    assert wide.values.dtype == factor.values.dtype
    assert wide.dense.dtype == torch.float32


def test_rank_zero_is_stored() -> None:
    assert store_factor(torch.zeros(0, 8), 8).dense.shape == (0, 8)
