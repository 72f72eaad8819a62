"""The candidates and the rounding of the scale search, against plain float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qe_dist.core.scheme import Scheme
from qe_dist.numerics.scale_search import power_scales, rounded_output

Normal = Callable[..., Tensor]
BF16 = 2.0**-8


@pytest.mark.parametrize("grid", [1, 4, 20])
def test_candidates_are_the_published_powers(normal: Normal, grid: int) -> None:
    size = normal(0, 12).abs() * 10
    for step, scale in enumerate(power_scales(size, grid)):
        powers = [float(s) ** (step / grid) for s in size]
        middle = (max(powers) * min(powers)) ** 0.5
        assert scale.tolist() == pytest.approx([p / middle for p in powers], rel=BF16)


def test_a_tiny_power_is_clamped() -> None:
    size = torch.tensor([1e-12, 1.0])
    scale = power_scales(size, 2)[1]  # powers 1e-6 and 1; clamped at 1e-4
    assert scale.tolist() == pytest.approx([1e-2, 1e2], rel=BF16)


def test_the_first_candidate_changes_nothing_and_a_silent_channel_is_never_changed(normal: Normal) -> None:
    size = normal(0, 12).abs().index_fill(0, torch.tensor([5]), 0.0)
    scales = power_scales(size, 20)
    assert torch.equal(scales[0], torch.ones(12))
    assert torch.equal(scales[:, 5], torch.ones(20))


def test_candidates_are_what_is_stored(normal: Normal) -> None:
    scales = power_scales(normal(0, 64).abs() + 0.1, 20)
    assert torch.equal(scales, scales.bfloat16().float())


@pytest.mark.parametrize("act_bits", [None, 4, 8])
@pytest.mark.parametrize("group_size", [None, 8])
def test_rounded_output_in_a_loop(normal: Normal, act_bits: int | None, group_size: int | None) -> None:
    x, weight, scale = normal(0, 5, 16), normal(1, 6, 16), normal(2, 16).abs() + 0.5
    found = rounded_output(x.double(), weight.double(), scale.double(), Scheme(4, act_bits, group_size))
    wide = weight.double() * scale.double()
    size = group_size or 16
    for t in range(5):
        token = x[t].double() / scale.double()
        if act_bits is not None:
            step = token.abs().max() / (2 ** (act_bits - 1) - 1)
            token = torch.round(token / step) * step
        for o in range(6):
            wanted = 0.0
            for i in range(16):
                part = wide[o, i // size * size : (i // size + 1) * size]
                step = float((part.abs().max() / 7.5).bfloat16())
                wanted += float(token[i]) * min(max(round(float(wide[o, i]) / step), -8), 7) * step
            assert float(found[t, o]) == pytest.approx(wanted, abs=1e-9)
