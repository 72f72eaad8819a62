"""The preparation of tokens, held against float64, and its codes against numerics.reference to the bit.

Every output is filled with NaN or 99 before the kernel runs, so what it does not write shows.
"""

from collections.abc import Iterator
from dataclasses import fields
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qe_kernels.extraction import extracted_columns
from qe_kernels.quantize import Activations, quantize
from qe_kernels.quantize_reference import quantize_reference
from torch import Tensor
from triton import language as tl
from triton.runtime import interpreter

from qe_dist.core.quantized import GroupInput
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.grid import round_activations
from qe_dist.numerics.reference import prepare

DTYPES = [torch.bfloat16, torch.float16]
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WIDTHS = [1, 2, 3, 17, 64, 100, 127, 128, 129, 300, 1024]
"""Of one column, of powers of two, and with tails of every kind."""


@pytest.fixture(autouse=True, scope="module")
def like_a_gpu() -> Iterator[None]:
    """The interpreter truncates to bf16 and warns of overflow; a GPU does neither. Outputs are poisoned."""
    convert = interpreter._convert_float

    def convert_nearest(values: np.ndarray, source: tl.dtype, target: tl.dtype, mode: Any) -> np.ndarray:
        kinds = {tl.bfloat16: torch.bfloat16, tl.float32: torch.float32}
        if source not in kinds or target not in kinds:
            return convert(values, source, target, mode)
        bits = {tl.bfloat16: torch.int16, tl.float32: torch.int32}
        signed = values.view(f"int{source.primitive_bitwidth}").copy()
        converted = torch.from_numpy(signed).view(kinds[source]).to(kinds[target]).view(bits[target])
        return converted.numpy().view(f"uint{target.primitive_bitwidth}")

    def new_filled(self: Tensor, *size: int, **options: Any) -> Tensor:
        filled = self.new_zeros(*size, **options)
        return filled.fill_(nan if filled.is_floating_point() else 99)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(interpreter, "_convert_float", convert_nearest)
        patch.setattr(Tensor, "new_empty", new_filled)
        yield


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(seed: int, tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Of very different size, with channels of very different size."""
    channel_sizes = (1.5 * draw(seed + 1, columns)).exp2()
    token_sizes = (4 * draw(seed + 2, tokens, 1)).exp2()
    return (draw(seed, tokens, columns) * channel_sizes * token_sizes).to(dtype)


def without(x: Tensor, channels: Tensor) -> Tensor:
    return x.index_fill(1, channels.long(), 0.0)


@st.composite
def inputs(draw_from: st.DrawFn) -> Tensor:
    seed, tokens = draw_from(st.integers(0, 999)), draw_from(st.integers(1, 3))
    return tokens_of(seed, tokens, draw_from(st.sampled_from(WIDTHS)), draw_from(st.sampled_from(DTYPES)))


def on_grid(x: Tensor, bits: int, outliers: int = 0) -> Tensor:
    """Qa by the library's own formula, for the channels that are on the grid. float32"""
    x = x.float()
    largest = x.abs().sort(dim=1, descending=True, stable=True).indices[:, :outliers]
    return round_activations(x.scatter(1, largest, 0.0), Scheme(4, bits)).scatter(1, largest, x.gather(1, largest))


# --- rounding -------------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(x=inputs(), bits=st.integers(3, 8), int8=st.booleans())
def test_codes_and_scales_are_those_of_the_formula_to_the_bit(x: Tensor, bits: int, int8: bool) -> None:
    made = quantize(x, bits=bits, int8=int8)
    top = 2 ** (bits - 1) - 1
    assert made.x is x
    assert made.base.dtype == (torch.int8 if int8 else x.dtype)
    assert torch.equal(made.token_scale, (x.float().abs().amax(dim=1) / top).clamp_min(2.0**-126))
    assert torch.equal(made.base.float() * made.token_scale[:, None], on_grid(x, bits))
    assert made.base.float().abs().amax(dim=1).tolist() == [float(top)] * len(x)


@settings(max_examples=12)
@given(x=inputs(), bits=st.integers(2, 8))
def test_every_value_goes_to_the_nearest_point(x: Tensor, bits: int) -> None:
    made = quantize(x, bits=bits, int8=True)
    scale = made.token_scale.double()[:, None]
    error = (made.base.double() * scale - x.double()).abs()
    assert (error <= 0.5 * scale * (1 + 2.0**-15)).all()  # float32 quotient of up to 128 steps


def test_half_way_goes_to_the_even_code() -> None:
    x = torch.tensor([[254.0, 1.0, 3.0, -1.0, -3.0, 125.0, 127.0, 253.0]], dtype=torch.bfloat16)
    made = quantize(x, bits=8, int8=True)
    assert made.token_scale.tolist() == [2.0]
    assert made.base.tolist() == [[127, 0, 2, 0, -2, 62, 64, 126]]


@settings(max_examples=12)
@given(x=inputs(), bits=st.integers(3, 8), share=st.floats(0, 1))
def test_dynamic_outlier_channels_stay_and_do_not_stretch_the_grid(x: Tensor, bits: int, share: float) -> None:
    """To the bit, but that points of the grid are rounded to 16 bits."""
    outliers = int(share * x.shape[1])
    made = quantize(x, bits=bits, outliers=outliers, int8=False)
    expected = on_grid(x, bits, outliers).to(x.dtype)
    if outliers:
        assert made.token_scale is None
        assert torch.equal(made.base, expected)
    else:
        assert torch.equal((made.base.float() * made.token_scale[:, None]).to(x.dtype), expected)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 999), columns=st.sampled_from([9, 64, 100]), outliers=st.integers(1, 8), bits=st.integers(3, 6)
)
def test_ties_at_the_threshold_of_outliers_do_not_matter(seed: int, columns: int, outliers: int, bits: int) -> None:
    """Few levels, so more than `outliers` channels are among the largest."""
    x = draw(seed, 2, columns).mul(1.5).round().bfloat16()
    assert torch.equal(
        quantize(x, bits=bits, outliers=outliers, int8=False).base, on_grid(x, bits, outliers).bfloat16()
    )


def test_the_grid_is_narrow_where_outliers_stay() -> None:
    """A grid that reached them would have only zeros for the others."""
    x = draw(0, 2, 200).bfloat16()
    x[:, 7], x[:, 100] = 3.0e4, -9.0e37
    made = quantize(x, bits=4, outliers=2, int8=False)
    others = torch.ones(200, dtype=torch.bool)
    others[[7, 100]] = False
    assert torch.equal(made.base[:, ~others], x[:, ~others])
    step = x[:, others].float().abs().amax(dim=1, keepdim=True) / 7
    assert ((made.base - x).float().abs()[:, others] <= (0.5 + 7 * 2.0**-8) * step).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [0, 3])
def test_a_token_of_zeros_stays_zero_beside_others(dtype: torch.dtype, outliers: int) -> None:
    x = tokens_of(0, 3, 40, dtype)
    x[1] = 0.0
    made = quantize(x, bits=6, outliers=outliers, int8=outliers == 0)
    assert not made.base[1].any()
    assert made.base[0].any()
    assert made.base[2].any()
    if not outliers:
        assert made.token_scale[1] == 2.0**-126


def test_fewer_values_than_outliers_leave_nothing_to_round() -> None:
    x = torch.zeros(2, 40, dtype=torch.bfloat16)
    x[:, [3, 30]] = torch.tensor([0.1, -1e30], dtype=torch.bfloat16)
    assert torch.equal(quantize(x, bits=4, outliers=5, int8=False).base, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [0, 4])
def test_huge_and_tiny_tokens_have_the_same_codes_to_the_bit(dtype: torch.dtype, outliers: int) -> None:
    limits = torch.finfo(dtype)
    sizes = torch.tensor([limits.max, limits.max / 2, 1.0, limits.tiny * 512, limits.smallest_normal])
    x = (draw(0, 5, 90).clamp(-4, 4) / 4).double() * sizes[:, None]
    x[:, 0] = sizes
    x = x.to(dtype)
    made = quantize(x, bits=8, outliers=outliers, int8=outliers == 0)
    found = made.base.float() if outliers else made.base.float() * made.token_scale[:, None]
    assert torch.equal(found.to(dtype), on_grid(x, 8, outliers).to(dtype))


def test_the_smallest_subnormals_fall_to_zero_and_not_to_nan() -> None:
    x = torch.full((1, 8), 2.0**-133, dtype=torch.bfloat16)
    made = quantize(x, bits=8, int8=True)
    assert made.token_scale.item() == 2.0**-126
    assert not made.base.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"int8": True}, {"int8": False}, {"int8": False, "outliers": 2}], ids=str)
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_value_that_is_not_finite_never_disappears(dtype: torch.dtype, options: dict[str, Any], bad: float) -> None:
    """Every output of that token must be NaN or infinite, which its scale or its base ensures; others as without it."""
    x = tokens_of(0, 3, 50, dtype)
    alone = quantize(x, bits=6, **options)
    x[1, 30] = bad
    made = quantize(x, bits=6, **options)
    loud = made.base[1] if made.token_scale is None else made.token_scale[1:2]
    assert not loud.isfinite().all()
    for before, after in ((alone.base, made.base), (alone.token_scale, made.token_scale)):
        assert after is None or torch.equal(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("bad", [nan, inf])
def test_more_of_them_than_outlier_channels_do_not_disappear_either(bad: float) -> None:
    x = tokens_of(0, 1, 50, torch.bfloat16)
    x[0, ::3] = bad
    made = quantize(x, bits=6, outliers=2, int8=False)
    assert not made.base[0, ::3].isfinite().any()


def test_one_inverse_and_a_correction_divide_as_ieee_754_demands() -> None:
    """The GPU's way, see `_divide`; the interpreter takes another, for not each of its versions has an fma. Tried on
    each significand that a bf16 value and its token's largest one can have, at all exponents that do not round to 0."""
    significands = torch.arange(128, 256, dtype=torch.float32)
    values = (significands[:, None] * 0.5 ** torch.arange(12)).flatten()
    for top in (1, 3, 7, 15, 31, 63, 127):
        scale = (significands / top)[:, None]
        inverse = 1.0 / scale
        quotient = values * inverse
        remainder = (values.double() - quotient.double() * scale.double()).float()  # exact
        assert torch.equal((quotient.double() + remainder.double() * inverse.double()).float(), values / scale)
        assert not torch.equal(quotient, values / scale) or top == 1


# --- norm, gate and scale -------------------------------------------------------------------------------------------


def prepared_exactly(
    x: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    input_scale: Tensor | None = None,
    modality: Tensor | None = None,
) -> Tensor:
    """x~ in float64, by other words than the kernel's."""
    x = x.double()
    if gated:
        half = x.shape[1] // 2
        x = x[:, :half] / (1 + (-x[:, :half]).exp()) * x[:, half:]
    if norm_weight is not None:
        x = x / (x.pow(2).mean(dim=1, keepdim=True) + eps).sqrt() * norm_weight.double()
    if input_scale is not None:
        x = x / torch.stack([input_scale[0 if modality is None else int(modality[t])].double() for t in range(len(x))])
    return x


@st.composite
def preparations(draw_from: st.DrawFn) -> tuple[Tensor, dict[str, Any]]:
    """An input and what is to be done with it, in any combination."""
    seed, dtype = draw_from(st.integers(0, 999)), draw_from(st.sampled_from(DTYPES))
    tokens, columns = draw_from(st.integers(1, 3)), draw_from(st.sampled_from(WIDTHS))
    modalities = draw_from(st.integers(0, 3))
    options: dict[str, Any] = {"gated": draw_from(st.booleans())}
    if draw_from(st.booleans()):
        options |= {"norm_weight": (draw(seed + 3, columns) / 4).exp2().to(dtype), "eps": 1e-5}
    if modalities:
        kind = draw_from(st.sampled_from([dtype, torch.float32]))
        options["input_scale"] = (draw(seed + 4, modalities, columns) / 2).exp2().to(kind)
    if modalities > 1:
        options["modality"] = (torch.arange(tokens) % modalities).to(torch.int8)
    x = draw(seed, tokens, columns * (2 if options["gated"] else 1)) * 2
    return x.to(dtype), options


@settings(max_examples=12)
@given(case=preparations())
def test_the_prepared_input_is_right_up_to_rounding(case: tuple[Tensor, dict[str, Any]]) -> None:
    x, options = case
    made = quantize(x, bits=None, int8=False, **options)
    roundings = 2 * options["gated"] + 2 * ("norm_weight" in options) + ("input_scale" in options)
    expected = prepared_exactly(x, **options)
    bound = 1.05 * roundings * ROUNDOFF[x.dtype] * expected.abs() + 1e-6  # fp16 is subnormal below 6e-5
    assert made.x.dtype == x.dtype
    assert ((made.x.double() - expected).abs() <= bound).all()
    assert made.base is made.x
    assert made.token_scale is None


@settings(max_examples=12)
@given(case=preparations(), bits=st.integers(3, 8), outliers=st.integers(0, 3))
def test_codes_are_those_of_the_prepared_input(case: tuple[Tensor, dict[str, Any]], bits: int, outliers: int) -> None:
    x, options = case
    prepared = quantize(x, bits=None, int8=False, **options).x
    outliers = min(outliers, prepared.shape[1] - 1)
    made = quantize(x, bits=bits, outliers=outliers, int8=not outliers, **options)
    assert torch.equal(made.x, prepared)
    found = made.base if outliers else (made.base.float() * made.token_scale[:, None]).to(x.dtype)
    assert torch.equal(found, on_grid(prepared, bits, outliers).to(x.dtype))


def test_the_norm_is_rounded_before_its_weight_as_models_do() -> None:
    x = torch.tensor([[5.0] * 4 + [4.0] * 2 + [2.0] * 3 + [0.0] * 7], dtype=torch.bfloat16)  # root mean square: 3
    weight = torch.linspace(1, 2, 16).bfloat16()
    made = quantize(x, bits=None, int8=False, norm_weight=weight, eps=0.0)
    assert torch.equal(made.x, (x.float() / 3).bfloat16() * weight)
    assert not torch.equal(made.x, (x.float() / 3 * weight).bfloat16())


def test_eps_bounds_what_a_norm_enlarges() -> None:
    x, weight = torch.full((1, 8), 2.0**-10).bfloat16(), torch.ones(8).bfloat16()
    made = quantize(x, bits=None, int8=False, norm_weight=weight, eps=3 * 2.0**-20)
    assert made.x.tolist() == [[0.5] * 8]


def test_the_scale_is_that_of_the_tokens_modality() -> None:
    x = torch.full((3, 4), 8.0, dtype=torch.bfloat16)
    scale = torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 4).contiguous()
    made = quantize(x, bits=None, int8=False, input_scale=scale, modality=torch.tensor([2, 0, 1], dtype=torch.int8))
    assert made.x[:, 0].tolist() == [2.0, 8.0, 4.0]


def test_one_scale_serves_every_modality() -> None:
    x, scale = tokens_of(0, 3, 20, torch.bfloat16), draw(1, 1, 20).exp2()
    modality = torch.tensor([2, 0, 1], dtype=torch.int8)
    made = quantize(x, bits=None, int8=False, input_scale=scale, modality=modality)
    assert torch.equal(made.x, (x / scale).bfloat16())


def test_very_negative_gates_close() -> None:
    x = torch.tensor([[-3e38, -200.0, 0.0, 1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    assert quantize(x, bits=None, int8=False, gated=True).x.tolist() == [[0.0, 0.0, 0.0]]


# --- extracted and salient channels ---------------------------------------------------------------------------------


def lists(columns: int) -> dict[str, Tensor]:
    """The experts have some channels in common with each other and with the shared one; one is another rank's."""
    shared, experts = torch.tensor([1, 5], dtype=torch.int32), torch.tensor([[2, 5, 0], [columns - 1, 2, columns]])
    experts = experts.to(torch.int32)
    extracted = extracted_columns(columns, shared, experts)
    return {"shared_channels": shared, "expert_channels": experts, "extracted": extracted}


def test_the_mask_of_extracted_columns() -> None:
    mask = lists(8)["extracted"]
    assert [row.nonzero().flatten().tolist() for row in mask] == [[1, 5], [0, 1, 2, 5], [1, 2, 5, 7]]
    assert mask.is_contiguous()
    assert extracted_columns(4, torch.tensor([3]), None).tolist() == [[0, 0, 0, 1]]
    assert extracted_columns(4, None, torch.tensor([[2]])).tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]


@settings(max_examples=12)
@given(x=inputs(), bits=st.sampled_from([None, 4, 8]), salient=st.integers(0, 3))
def test_extraction_is_that_of_the_formula(x: Tensor, bits: int | None, salient: int) -> None:
    """`prepare` of the library, for tokens with each expert and without."""
    if x.shape[1] < 8:
        x = x.repeat(1, 8)
    columns, expert = x.shape[1], torch.arange(len(x), dtype=torch.int32) % 3 - 1
    channels = columns - torch.arange(salient, dtype=torch.int32)
    part = GroupInput(
        shared_channels=lists(columns)["shared_channels"],
        expert_channels=lists(columns)["expert_channels"],
        salient_channels=channels,
    )
    truth = prepare(part, x, expert.long(), Scheme(4, bits))
    made = quantize(x, bits=bits, int8=bits is not None, expert=expert, salient_channels=channels, **lists(columns))
    scale = 1.0 if made.token_scale is None else made.token_scale[:, None]
    assert made.x is x
    assert torch.equal(made.base.float() * scale, truth.base)
    assert torch.equal(made.shared_z.float(), truth.shared_channels)
    assert torch.equal(made.salient_z, truth.salient.to(x.dtype))
    assert torch.equal(made.expert_z.float(), truth.expert_channels)


@settings(max_examples=12)
@given(case=preparations(), bits=st.integers(3, 8), outliers=st.integers(0, 3))
def test_extracted_channels_carry_the_prepared_input(
    case: tuple[Tensor, dict[str, Any]], bits: int, outliers: int
) -> None:
    """Read and prepared a second time, they are the same to the bit; the rest is rounded as if they were zero, and so
    are all channels where they are salient."""
    x, options = case
    columns = x.shape[1] // (1 + options["gated"])
    channels, expert = torch.arange(0, columns, 2), torch.arange(len(x), dtype=torch.int32) - 1
    own = channels[torch.tensor([[0], [-1], [0]])]
    outliers = min(outliers, columns - 1)
    everything = torch.arange(columns).flip(0)
    given_lists = {"shared_channels": channels, "expert_channels": own, "salient_channels": everything}
    made = quantize(
        x, bits=bits, outliers=outliers, int8=not outliers, expert=expert,
        extracted=extracted_columns(columns, channels, own), **given_lists, **options,
    )  # fmt: skip
    assert torch.equal(made.shared_z, made.x[:, channels])
    assert made.expert_z[:, 0].tolist() == [0.0] + [made.x[t + 1, own[t, 0]].item() for t in range(len(x) - 1)]
    found = made.base if outliers else (made.base.float() * made.token_scale[:, None]).to(x.dtype)
    assert torch.equal(found, on_grid(without(made.x, channels), bits, outliers).to(x.dtype))
    assert torch.equal(made.salient_z, found.flip(1))


def test_what_is_extracted_may_be_infinite() -> None:
    """It no longer stretches the grid, and no product brings NaN in."""
    x = tokens_of(0, 1, 20, torch.bfloat16)
    x[0, 4] = inf
    channels = torch.tensor([4])
    extracted = extracted_columns(20, channels, None)
    made = quantize(x, bits=4, int8=True, shared_channels=channels, extracted=extracted)
    assert made.shared_z.tolist() == [[inf]]
    assert torch.equal(made.base * made.token_scale[:, None], on_grid(without(x, channels), 4))


# --- shapes ---------------------------------------------------------------------------------------------------------


EVERYTHING = {"norm_weight": torch.ones(16), "gated": True, "input_scale": torch.ones(1, 16), **lists(16)}


def test_no_tokens() -> None:
    x, expert = torch.empty(0, 32, dtype=torch.bfloat16), torch.empty(0, dtype=torch.int32)
    made = quantize(x, bits=4, int8=True, expert=expert, salient_channels=torch.tensor([3]), **EVERYTHING)
    shapes = {name: list(tensor.shape) for name, tensor in vars(made).items()}
    assert shapes == {
        "x": [0, 16], "base": [0, 16], "token_scale": [0], "shared_z": [0, 2], "expert_z": [0, 3], "salient_z": [0, 1],
    }  # fmt: skip


def test_empty_lists_of_channels() -> None:
    x, none = tokens_of(0, 2, 20, torch.bfloat16), torch.empty(0, dtype=torch.int32)
    extracted = extracted_columns(20, none, None)
    made = quantize(x, bits=4, int8=True, shared_channels=none, salient_channels=none, extracted=extracted)
    assert made.shared_z.shape == made.salient_z.shape == (2, 0)
    assert torch.equal(made.base, quantize(x, bits=4, int8=True).base)


def test_rows_may_lie_apart_and_anywhere() -> None:
    """Such as q of a fused qkv."""
    wide = tokens_of(0, 3, 50, torch.float16)
    x = wide[:, 7:40]
    made, expected = (quantize(part, bits=5, int8=True) for part in (x, x.contiguous()))
    assert torch.equal(made.base, expected.base)
    assert torch.equal(made.token_scale, expected.token_scale)


@pytest.mark.parametrize("columns", [8192, 29696])
def test_the_widths_of_the_large_model(columns: int) -> None:
    """29696 is padded to 32768 in the kernel, and no padding is an outlier."""
    x = tokens_of(0, 1, columns, torch.bfloat16)
    assert torch.equal(quantize(x, bits=4, outliers=64, int8=False).base, on_grid(x, 4, 64).bfloat16())


def test_a_wide_row_is_read_twice_and_comes_out_once() -> None:
    """With all that may be done to it."""
    columns = 20000
    channels, weight = torch.arange(0, columns, 5), torch.ones(columns).bfloat16()
    made = quantize(
        tokens_of(0, 2, 2 * columns, torch.bfloat16), bits=6, int8=True, gated=True, norm_weight=weight,
        input_scale=draw(1, 1, columns).exp2(), shared_channels=channels,
        extracted=extracted_columns(columns, channels, None),
    )  # fmt: skip
    assert torch.equal(made.shared_z, made.x[:, channels])
    assert torch.equal(made.base * made.token_scale[:, None], on_grid(without(made.x, channels), 6))


def test_x_is_left_out_where_nothing_needs_it() -> None:
    x, weight = tokens_of(0, 2, 20, torch.bfloat16), torch.ones(20).bfloat16()
    lean, full = (quantize(x, bits=4, int8=True, norm_weight=weight, with_x=w) for w in (False, True))
    assert lean.x is None
    assert torch.equal(lean.base, full.base)
    assert quantize(x, bits=None, int8=False, norm_weight=weight, with_x=False).base.isfinite().all()


# --- the reference beside the kernel --------------------------------------------------------------------------------


@settings(max_examples=12)
@given(case=preparations(), bits=st.sampled_from([None, 3, 8]), outliers=st.integers(0, 2), with_x=st.booleans())
def test_the_reference_agrees(
    case: tuple[Tensor, dict[str, Any]], bits: int | None, outliers: int, with_x: bool
) -> None:
    """To the bit where nothing is summed: sums and roots may differ in their last bits."""
    x, options = case
    columns = x.shape[1] // (1 + options["gated"])
    channels, expert = torch.arange(0, columns, 3), torch.arange(len(x), dtype=torch.int32) - 1
    own = channels[torch.tensor([[0], [-1], [0]])]
    outliers = 0 if bits is None else min(outliers, columns - 1)
    options |= {
        "bits": bits, "outliers": outliers, "int8": bits is not None and not outliers, "with_x": with_x,
        "expert": expert, "shared_channels": channels, "expert_channels": own, "salient_channels": channels,
        "extracted": extracted_columns(columns, channels, own),
    }  # fmt: skip
    made, expected = quantize(x, **options), quantize_reference(x, **options)
    exact = not options["gated"] and "norm_weight" not in options
    for name in (f.name for f in fields(Activations)):
        a, b = getattr(made, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            if exact:
                assert torch.equal(a, b), name
            elif name.endswith(("x", "z")):
                assert torch.allclose(a.float(), b.float(), rtol=4 * ROUNDOFF[x.dtype], atol=1e-6), name


@settings(max_examples=12)
@given(case=preparations())
def test_the_reference_in_float64_is_exact(case: tuple[Tensor, dict[str, Any]]) -> None:
    x, options = case
    made = quantize_reference(x.double(), bits=8, int8=True, **options)
    assert torch.allclose(made.x, prepared_exactly(x, **options), rtol=1e-13, atol=0.0)
    error = (made.base * made.token_scale[:, None] - made.x).abs()
    assert (error <= 0.5 * (1 + 1e-12) * made.token_scale[:, None]).all()
