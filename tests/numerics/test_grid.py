"""Symmetric grids, held against all codes by brute force, a float64 loop, and compressed-tensors."""

import math
from collections.abc import Callable

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.grid import dequantize, full_range_scale, round_activations, round_to_grid, weight_scale

Normal = Callable[..., Tensor]
BITS = range(2, 9)
BF16 = 2.0**-8
"""Unit roundoff: the largest relative error of rounding to bf16."""


@pytest.fixture
def weight(normal: Normal) -> Tensor:
    """Rows of very different size, one of them zero."""
    rows = normal(0, 12, 64) * torch.logspace(-6, 3, 12)[:, None]
    rows[5] = 0.0
    return rows


def all_points(scale: Tensor, bits: int, columns: int) -> Tensor:
    """Every point of the grid that a weight may go to, in float64. [O, I, 2^bits]"""
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float64)
    return scale.double().repeat_interleave(columns // scale.shape[1], dim=1)[..., None] * codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 8, 32])
def test_every_weight_goes_to_the_nearest_point(weight: Tensor, bits: int, group_size: int | None) -> None:
    scale = weight_scale(weight, bits, group_size)
    codes = round_to_grid(weight, scale, bits)
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1
    error = (weight.double() - dequantize(codes, scale, torch.float64)).abs()
    nearest = (weight.double()[..., None] - all_points(scale, bits, 64)).abs().amin(dim=-1)
    # The quotient is rounded to float32, so a weight half-way between two points may go to either.
    assert (error <= nearest + 2.0**-23 * weight.abs()).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 8])
def test_the_error_is_at_most_half_a_step(weight: Tensor, bits: int, group_size: int | None) -> None:
    """But at the top, where the bf16 scale may come out too small for the largest weight."""
    scale = weight_scale(weight, bits, group_size)
    codes = round_to_grid(weight, scale, bits)
    step = scale.double().repeat_interleave(64 // scale.shape[1], dim=1)
    error = (weight.double() - dequantize(codes, scale, torch.float64)).abs() / step
    at_the_top = (2**bits - 1) / 2 * BF16 / (1 - BF16)
    inside = weight.double().abs() <= (2 ** (bits - 1) - 1) * step
    assert error[inside].max() <= 0.5 * (1 + 1e-4)  # float32 quotient of up to 128 steps
    assert error.max() <= 0.5 * (1 + 1e-4) + at_the_top


@pytest.mark.parametrize("bits", BITS)
def test_the_scale_is_what_compressed_tensors_calculates(weight: Tensor, bits: int) -> None:
    """Up to its type: theirs is float32 here, ours the bf16 that is stored."""
    rows = weight[weight.abs().amax(dim=1) > 0]  # an empty row is ours to define
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="channel")
    theirs, zero_point = calculate_qparams(rows.amin(dim=1), rows.amax(dim=1), args)
    ours = weight_scale(rows, bits, None)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours[:, 0], theirs.bfloat16())
    assert not zero_point.any()


def test_each_group_of_columns_has_its_own_scale(weight: Tensor) -> None:
    grouped = weight_scale(weight, 4, 16)
    alone = [weight_scale(part, 4, None) for part in weight.split(16, dim=1)]
    assert torch.equal(grouped, torch.cat(alone, dim=1))
    codes = [round_to_grid(part, scale, 4) for part, scale in zip(weight.split(16, dim=1), alone, strict=True)]
    assert torch.equal(round_to_grid(weight, grouped, 4), torch.cat(codes, dim=1))


@pytest.mark.parametrize("group_size", [None, 16])
def test_a_zero_row_is_zero(weight: Tensor, group_size: int | None) -> None:
    scale = weight_scale(weight, 4, group_size)
    codes = round_to_grid(weight, scale, 4)
    assert (scale[5] > 0).all()
    assert not codes[5].any()
    assert not dequantize(codes, scale)[5].any()


def test_weights_too_small_for_a_scale_are_zero() -> None:
    tiny = torch.full((1, 8), torch.finfo(torch.float32).tiny / 2**20)
    scale = weight_scale(tiny, 4, None)
    assert torch.isfinite(scale).all()
    assert torch.isfinite(dequantize(round_to_grid(tiny, scale, 4), scale)).all()


def test_a_group_size_that_does_not_fit_is_refused_with_both_numbers(weight: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"24 .* 64"):
        weight_scale(weight, 4, 24)


def test_points_of_the_grid_stay_where_they_are(normal: Normal) -> None:
    codes = (4 * normal(1, 6, 32)).clamp(-8, 7).to(torch.int8)
    scale = normal(2, 6, 2).abs().bfloat16()
    assert torch.equal(round_to_grid(dequantize(codes, scale), scale, 4), codes)


def rounded_token(token: list[float], bits: int) -> list[float]:
    top = 2 ** (bits - 1) - 1
    scale = max(abs(value) for value in token) / top
    return [round(value / scale) * scale for value in token] if scale else token


@pytest.mark.parametrize("bits", range(3, 9))
def test_activations_follow_the_loop_over_tokens(normal: Normal, bits: int) -> None:
    x = normal(3, 20, 48) * torch.logspace(-5, 5, 20)[:, None]
    wanted = torch.tensor([rounded_token(token.tolist(), bits) for token in x], dtype=torch.float64)
    peak = x.abs().amax(dim=1, keepdim=True).double()
    assert ((round_activations(x, Scheme(4, bits)).double() - wanted).abs() / peak).max() < 1e-6  # float32


@pytest.mark.parametrize("bits", range(3, 9))
def test_activations_use_all_levels_and_no_more(bits: int) -> None:
    """Levels -q .. q: the integer tensor cores have no use for an extra negative one."""
    levels = round_activations(torch.linspace(-3, 3, 1001)[None], Scheme(4, bits)).unique()
    assert len(levels) == 2**bits - 1
    assert torch.equal(levels, -levels.flip(0))
    assert math.isclose(levels[-1], 3, rel_tol=1e-6)


def test_activations_in_16_bits_are_left_alone(normal: Normal) -> None:
    x = normal(5, 3, 8)
    assert round_activations(x, Scheme(4, None)) is x


def test_a_zero_token_stays_zero(normal: Normal) -> None:
    x = normal(6, 3, 8)
    x[1] = 0.0
    assert not round_activations(x, Scheme(4, 4))[1].any()


def test_a_token_is_rounded_alone(normal: Normal) -> None:
    x = normal(7, 6, 16)
    alone = torch.cat([round_activations(token[None], Scheme(4, 6)) for token in x])
    assert torch.equal(round_activations(x, Scheme(4, 6)), alone)


@pytest.mark.parametrize("outliers", [64, 640])  # 2 and 20 of 48, cut as on every narrow layer
def test_dynamic_outlier_channels_leave_the_grid_to_the_others(normal: Normal, outliers: int) -> None:
    x = normal(8, 5, 48) * torch.linspace(0.1, 30, 48)
    found = round_activations(x, Scheme(4, 4, dynamic_outliers=outliers))
    count = 48 * outliers // 1536
    for token, got in zip(x, found, strict=True):
        order = sorted(range(48), key=lambda c: -abs(float(token[c])))
        largest, others = order[:count], order[count:]
        assert torch.equal(got[largest], token[largest])
        wanted = rounded_token([float(token[c]) for c in others], 4)
        assert torch.allclose(got[others].double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-5)


def test_the_largest_channels_are_of_any_sign() -> None:
    x = torch.tensor([[-100.0, 1.0, 2.0, 3.0] + [0.5] * 44])
    assert round_activations(x, Scheme(4, 8, dynamic_outliers=32))[0, 0] == -100.0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 8, 32])
def test_on_the_full_range_the_largest_weight_has_the_code_without_a_counterpart(
    weight: Tensor, bits: int, group_size: int | None
) -> None:
    """Whatever its sign, so that it is met up to the bf16 of the scale; the others are met within half a step."""
    scale = full_range_scale(weight, bits, group_size)
    codes = round_to_grid(weight, scale, bits)
    size = group_size or 64
    groups, steps = weight.unflatten(1, (-1, size)).double(), scale.double()[..., None]
    peak = groups.abs().argmax(-1, keepdim=True)
    largest = groups.gather(-1, peak)
    rows = largest != 0
    assert scale.dtype == torch.bfloat16
    assert (codes.unflatten(1, (-1, size)).gather(-1, peak)[rows] == -(2 ** (bits - 1))).all()
    assert ((largest - steps * -(2 ** (bits - 1))).abs() <= BF16 * largest.abs())[rows].all()
    error = (groups - dequantize(codes, scale, torch.float64).unflatten(1, (-1, size))).abs()
    opposite = groups.sign() != largest.sign()  # on that side the grid ends a step earlier
    assert (error[~opposite] <= ((0.5 + 2**bits * BF16) * steps.abs().expand_as(groups))[~opposite]).all()
    assert (error <= (1 + 2**bits * BF16) * steps.abs()).all()
