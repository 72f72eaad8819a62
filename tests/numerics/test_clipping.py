"""The search for a scale against all factors tried one row and one group at a time, in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qe_dist.core.errors import NumericalError
from qe_dist.numerics import clipping
from qe_dist.numerics.clipping import clip_factors, clipped_scale, scaled
from qe_dist.numerics.grid import dequantize, round_to_grid, weight_scale

Normal = Callable[..., Tensor]


def layer(seed: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Weights with heavy tails, and a Gram matrix with strong correlations. float64"""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=random).double()
    x = torch.randn(2 * width, width, generator=random) + torch.randn(2 * width, 1, generator=random)
    return weight * weight.abs(), x.double().T @ x.double()


def error(w: Tensor, scale: Tensor, bits: int, metric: Tensor) -> float:
    codes = torch.round(w / scale.double()).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    e = w - codes * scale.double()
    return float(e @ metric @ e)


@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    groups=st.integers(1, 3),
    size=st.integers(1, 9),
    with_gram=st.booleans(),
)
def test_no_other_factor_has_less_error(seed: int, bits: int, groups: int, size: int, with_gram: bool) -> None:
    weight, gram = layer(seed, 4, groups * size)
    found = clipped_scale(weight, bits, size if groups > 1 else None, gram if with_gram else None)
    metric = gram if with_gram else torch.eye(groups * size).double()
    for row in range(4):
        for g in range(groups):
            own = slice(g * size, (g + 1) * size)
            w = weight[row, own]
            plain = (w.abs().max() / ((2**bits - 1) / 2)).bfloat16()
            tried = [(f * plain.double()).bfloat16() for f in clip_factors(bits, 24)]
            least = min(error(w, scale, bits, metric[own, own]) for scale in tried)
            assert found[row, g] in tried
            assert error(w, found[row, g], bits, metric[own, own]) <= least * (1 + 1e-9)


@pytest.mark.parametrize("bits", range(2, 9))
def test_factors_reach_from_half_to_where_the_largest_weight_fits(bits: int) -> None:
    factors = clip_factors(bits, 24)
    assert len(factors) == 24
    assert factors[0] == 1.0
    assert min(factors) == 0.5
    largest = 3.0
    plain = largest / ((2**bits - 1) / 2)
    assert (2 ** (bits - 1) - 1) * plain * max(factors) == pytest.approx(largest)


def test_a_smaller_grid_helps_a_row_with_a_far_outlier() -> None:
    """A thousand small weights are worth more than the tip of a large one."""
    weight = torch.tensor([[1.0, *([0.04] * 1000)]])
    assert clipped_scale(weight, 4, None) < 0.9 * weight_scale(weight, 4, None)


def test_a_loud_channel_is_not_clipped() -> None:
    weight = torch.tensor([[1.0, *([0.04] * 1000)]])
    gram = torch.diag(torch.tensor([1e6, *([1.0] * 1000)]))
    scale = clipped_scale(weight, 4, None, gram)
    assert dequantize(round_to_grid(weight, scale, 4), scale)[0, 0] == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("power", [-120, 127])
def test_the_size_of_the_gram_matrix_does_not_matter(power: int) -> None:
    """Up to where float32 ends, and the sum of two entries is infinite."""
    weight, gram = (16 * t.float() for t in layer(4, 6, 16))
    of_that_size = gram * 2.0 ** (power - math.frexp(float(gram.max()))[1])
    assert torch.equal(clipped_scale(weight, 3, 8, of_that_size), clipped_scale(weight, 3, 8, gram))


def test_inputs_that_never_came_choose_nothing(normal: Normal) -> None:
    weight = normal(5, 4, 16)
    assert torch.equal(clipped_scale(weight, 4, 8, torch.zeros(16, 16)), weight_scale(weight, 4, 8))


def test_an_error_beyond_the_numbers_is_refused(normal: Normal) -> None:
    with pytest.raises(NumericalError, match="error of rounding"):
        clipped_scale(normal(6, 2, 8) * 1e30, 2, None)


def test_rows_are_searched_in_parts(normal: Normal, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = normal(0, 23, 16), torch.eye(16)
    whole = clipped_scale(weight, 4, 8, gram)
    monkeypatch.setattr(clipping, "ROWS", 5)
    assert torch.equal(clipped_scale(weight, 4, 8, gram), whole)


def test_of_equals_the_first_wins(normal: Normal) -> None:
    """A zero row is rounded without error at any scale."""
    weight = normal(1, 3, 16).index_fill(0, torch.tensor([1]), 0.0)
    scale = clipped_scale(weight, 4, None)
    assert scale[1] == 1
    assert clipped_scale(weight, 4, None, factors=[0.9, 0.9])[1] == torch.tensor(0.9).bfloat16()


def test_a_scale_never_becomes_zero() -> None:
    smallest = torch.full((2, 1), 2.0**-133).bfloat16()
    assert smallest.all()
    assert torch.equal(scaled(smallest, 0.4), smallest)


def test_the_weight_is_left_as_it_was(normal: Normal) -> None:
    weight = normal(2, 6, 16)
    before = weight.clone()
    clipped_scale(weight, 3, 8)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_poisoned_gram_matrix_is_refused(normal: Normal, bad: float) -> None:
    """Between groups too, where the search does not look."""
    gram = torch.eye(16)
    gram[2, 12] = bad
    with pytest.raises(NumericalError, match="NaN or Inf"):
        clipped_scale(normal(3, 4, 16), 4, 8, gram)
