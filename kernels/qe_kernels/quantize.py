"""The input of a group of linears: norm or SiLU, the transform's scale, extraction, and rounding of each token.

    x~ = [ rms_norm(x) | silu(gate) * up | x ] / input_scale          base * token_scale = Qa(x~ without extracted)

One program prepares a token and holds its row in registers until it is rounded. Per token of K channels of 16 bits it
moves, in bytes of memory,

    read x 2K (gated 4K)  +  write x~ 2K (where it differs from x and `with_x`)  +  write base K (int8) or 2K

which is the floor of what it is asked for: each input is read once and each output written once. (Weights, scales and
`extracted` are the same for all tokens and stay in the L2 cache; channels by index, and rows of more than 16384, are
read once more from there.) A norm with int8 codes moves 5K, without x~ 3K; norm, division and rounding as three kernels
move 11K. Not timed on a GPU.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qe_kernels.launch import Launch
from qe_kernels.triton_if_any import INTERPRET, tl, triton

_TINY = tl.constexpr(2.0**-126)
"""The smallest normal fp32: no scale is smaller, so a token of zeros has one to divide by."""
_ROUNDER = tl.constexpr(1.5 * 2.0**23)
"""Added to an fp32 below 2^22, rounds it to an integer, half to even, which is then the sum's lowest bits."""


_WIDE = tl.constexpr(16384)
"""A longer row leaves no thread room for all at once: between its reductions it is read again, from the L2 cache, and
a barrier keeps the compiler from merging the reads."""


@dataclass(frozen=True)
class Activations:
    """What the linears of a group share. NaN or infinity in a token of x ends up, not finite, in its `token_scale` or,
    where that is None, in its `base`, so all its outputs are NaN or infinite; other tokens do not notice."""

    x: Tensor | None
    """x~ [M, K] in x's dtype, x itself if nothing changes it; None if not asked for."""
    base: Tensor
    """Qa(x~), extracted channels zero, over `token_scale`: codes [M, K] in int8 or as integers in x's dtype. With
    dynamic outlier channels Qa(x~) itself in x's dtype: these as they are, the others rounded. x~ if bits is None."""
    token_scale: Tensor | None
    """fp32 [M]; None: 1."""
    shared_z: Tensor | None
    """x~ of the channels [M, C] that the shared expert extracts."""
    expert_z: Tensor | None
    """x~ of the channels [M, D] that the token's own expert extracts; zero for a token without one."""
    salient_z: Tensor | None
    """Qa(x~) of the salient channels [M, S] in x's dtype: what `base` holds there, times `token_scale`."""


class New(NamedTuple):
    """Which of `Activations` are tensors of their own, and not x or another one."""

    x: bool
    base: bool
    token_scale: bool


def new_tensors(
    bits: int | None,
    outliers: int,
    norm_weight: Tensor | None,
    gated: bool,
    input_scale: Tensor | None,
    extracted: Tensor | None,
    with_x: bool,
) -> New:
    """Which tensors a call of `quantize` with these arguments makes anew."""
    changed = gated or norm_weight is not None or input_scale is not None
    base = bits is not None or extracted is not None
    return New(changed and (with_x or not base), base, bits is not None and not outliers)


class Quantizer:
    """What is the same for every call of `quantize` on tokens of one width."""

    def __init__(
        self,
        columns: int,
        *,
        bits: int | None,
        outliers: int = 0,
        int8: bool,
        norm_weight: Tensor | None = None,
        eps: float = 1e-6,
        gated: bool = False,
        input_scale: Tensor | None = None,
        shared_channels: Tensor | None = None,
        expert_channels: Tensor | None = None,
        extracted: Tensor | None = None,
        salient_channels: Tensor | None = None,
        with_x: bool = True,
    ) -> None:
        """columns: K; the others as `quantize` takes them."""
        self.columns, self.int8, self.with_x = columns, int8, with_x
        self.norm, self.input_scale = (norm_weight, eps), input_scale
        self.by_modality = input_scale is not None and len(input_scale) > 1
        self.by_expert = expert_channels is not None
        extracts = shared_channels is not None or self.by_expert
        self.extracted = extracted if extracts else None
        self.new = new_tensors(bits, outliers, norm_weight, gated, input_scale, self.extracted, with_x)
        self.lists = (shared_channels, expert_channels, salient_channels)
        self.lengths = tuple(0 if channels is None else channels.shape[-1] for channels in self.lists)
        block = triton.next_power_of_2(columns)
        constants = (*self.lengths, gated, 0 if bits is None else 2 ** (bits - 1) - 1, outliers, block)
        self.launch = Launch(_quantize, constants, warps(block))

    def __call__(self, x: Tensor, modality: Tensor | None = None, expert: Tensor | None = None) -> Activations:
        made = self._empty(x)
        if len(x) and (self.new.x or self.new.base or any(self.lengths)):
            self.launch((len(x), 1, 1), self._given(x, modality, expert, made))
        prepared = x if made[0] is None else made[0]
        return Activations(prepared if self.with_x else None, prepared if made[1] is None else made[1], *made[2:])

    def compile(self, x: Tensor, modality: Tensor | None = None, expert: Tensor | None = None) -> None:
        """For inputs like these, of any number of tokens."""
        if self.new.x or self.new.base or any(self.lengths):
            self.launch.compile(self._given(x, modality, expert, self._empty(x)))

    def _empty(self, x: Tensor) -> list[Tensor | None]:
        """x~, base, token scale, and the channels of the lists."""
        tokens, columns = x.shape[0], self.columns
        return [
            x.new_empty((tokens, columns)) if self.new.x else None,
            x.new_empty((tokens, columns), dtype=torch.int8 if self.int8 else x.dtype) if self.new.base else None,
            x.new_empty((tokens,), dtype=torch.float32) if self.new.token_scale else None,
            *(
                None if channels is None else x.new_empty((tokens, length))
                for channels, length in zip(self.lists, self.lengths, strict=True)
            ),
        ]

    def _given(
        self, x: Tensor, modality: Tensor | None, expert: Tensor | None, made: list[Tensor | None]
    ) -> tuple[Any, ...]:
        return (
            x, x.stride(0), self.columns, *made[:3], *self.norm, self.input_scale,
            modality if self.by_modality else None, self.extracted, expert if self.by_expert else None,
            *self.lists, *made[3:],
        )  # fmt: skip


def quantize(x: Tensor, *, modality: Tensor | None = None, expert: Tensor | None = None, **how: Any) -> Activations:
    """Prepare x [M, K] of bf16 or fp16, rows contiguous, or [M, 2K] = [gate | up] if `gated`; K <= 32768.

    bits: of the grid -q .. q, q = 2^(bits-1) - 1, that reaches each token's largest magnitude; None: no rounding.
    outliers: dynamic outlier channels, the largest of each token: not rounded, and no stretch of the grid; not with
    int8, for they are unrounded values in `base`.
    int8: whether the codes are int8 or integers in x's dtype.
    norm_weight [K], eps: RMSNorm in fp32; its result is rounded to x's dtype before and after the weight, as models do.
    input_scale [1, K], or [modalities, K] with modality [M], the row of each token.
    shared_channels [C], expert_channels [E, D] with expert [M] (-1: none): integers; `extracted_columns` of the two.
    salient_channels [S]. A channel K is another rank's, and its z is zero.
    with_x: whether x~ is needed beside base, for a down projection.

    `ops.quantize` checks all but the values of indices, for which the device would have to be waited for.
    """
    columns = x.shape[1] // 2 if how.get("gated") else x.shape[1]
    return Quantizer(columns, **how)(x, modality, expert)


def warps(block: int) -> int:
    """16 channels a thread, two vector loads of 16 bytes; more only where a program can have no more threads."""
    return min(max(block // 512, 1), 32)


@triton.jit(do_not_specialize_on_alignment=["modality", "expert"])  # they may be parts of longer lists
def _quantize(
    x, x_stride, columns, prepared, base, token_scale,
    norm_weight, eps, input_scale, modality,
    extracted, expert, shared_channels, expert_channels, salient_channels, shared_z, expert_z, salient_z,
    SHARED: tl.constexpr, EXPERT: tl.constexpr, SALIENT: tl.constexpr,
    GATED: tl.constexpr, TOP: tl.constexpr, OUTLIERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token. Pointers may be None; SHARED, EXPERT, SALIENT: lengths of the lists of channels; TOP: the largest
    code, 0 without rounding; BLOCK: power of two, at least `columns`."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    WIDE: tl.constexpr = BLOCK > _WIDE
    token = tl.program_id(0).to(tl.int64)
    x += token * x_stride
    if modality is not None:
        input_scale += tl.load(modality + token).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    within = column < columns

    rstd = 1.0
    if norm_weight is not None:
        hidden = _load(x, column, within, columns, GATED)
        rstd = tl.rsqrt(tl.sum(hidden * hidden, 0) / columns + eps)
        if WIDE:
            tl.debug_barrier()
    value = _prepare(x, column, within, columns, rstd, norm_weight, input_scale, GATED)
    if prepared is not None:
        tl.store(prepared + token * columns + column, value, within)

    own = -1
    if expert is not None:
        own = tl.load(expert + token).to(tl.int32)
        expert_channels += tl.maximum(own, 0) * EXPERT
    if SHARED > 0:
        _gather(shared_z, token, shared_channels, SHARED, SHARED, x, columns, rstd, norm_weight, input_scale, GATED)
    if EXPERT > 0:
        listed = tl.where(own < 0, 0, EXPERT)
        _gather(expert_z, token, expert_channels, EXPERT, listed, x, columns, rstd, norm_weight, input_scale, GATED)

    scale, reach = 1.0, 0.0
    if base is not None:
        if extracted is not None:
            extracted += (own + 1) * columns
            value = _without(value, extracted, column, within)
        base += token * columns
        if TOP == 0:
            tl.store(base + column, value, within)
        else:
            magnitude = value.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
            if OUTLIERS == 0:
                reach = _as_float(tl.max(magnitude, 0), DTYPE)
            else:
                reach = _as_float(_largest_rounded(magnitude, columns, OUTLIERS, BLOCK), DTYPE)
            scale = tl.div_rn(reach, TOP * 1.0)
            scale = tl.where(scale < _TINY, _TINY, scale)  # NaN stays
            if token_scale is not None:
                tl.store(token_scale + token, scale)
            if WIDE:
                tl.debug_barrier()
                for start in range(0, BLOCK, BLOCK // 2):
                    half = start + tl.arange(0, BLOCK // 2)
                    there = half < columns
                    part = _prepare(x, half, there, columns, rstd, norm_weight, input_scale, GATED)
                    if extracted is not None:
                        part = _without(part, extracted, half, there)
                    tl.store(base + half, _round(part, scale, reach, OUTLIERS, base.dtype.element_ty), there)
            else:
                tl.store(base + column, _round(value, scale, reach, OUTLIERS, base.dtype.element_ty), within)
    if SALIENT > 0:
        at = tl.arange(0, triton.next_power_of_2(SALIENT))
        channel = tl.load(salient_channels + at, at < SALIENT, other=columns)
        here = channel < columns
        term = _prepare(x, channel, here, columns, rstd, norm_weight, input_scale, GATED)
        if extracted is not None:
            term = _without(term, extracted, channel, here)
        if TOP > 0:
            term = _round(term, scale, reach, OUTLIERS, DTYPE)
            if OUTLIERS == 0:
                term = (term.to(tl.float32) * scale).to(DTYPE)
        tl.store(salient_z + token * SALIENT + at, tl.where(here, term, tl.zeros_like(term)), at < SALIENT)


@triton.jit
def _load(x, column, within, columns, GATED: tl.constexpr):
    """The token before norm and scale, at these columns: fp32, but rounded to x's dtype, as every step is."""
    value = tl.load(x + column, within, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x + columns + column, within, other=0.0).to(tl.float32)
        value = _rounded(_rounded(value / (1 + tl.exp(-value)), x) * up, x)
    return value


@triton.jit
def _prepare(x, column, within, columns, rstd, norm_weight, input_scale, GATED: tl.constexpr):
    """x~ at these columns, in x's dtype."""
    value = _load(x, column, within, columns, GATED)
    if norm_weight is not None:
        weight = tl.load(norm_weight + column, within, other=0.0).to(tl.float32)
        value = _rounded(_rounded(value * rstd, x) * weight, x)
    if input_scale is not None:
        value = value / tl.load(input_scale + column, within, other=1.0).to(tl.float32)
    return value.to(x.dtype.element_ty)


@triton.jit
def _rounded(value, x):
    return value.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _without(value, extracted, column, within):
    leaves = tl.load(extracted + column, within, other=0)
    return tl.where(leaves != 0, tl.zeros_like(value), value)  # no product: it may be infinite


@triton.jit
def _gather(
    z, token, channels, COUNT: tl.constexpr, listed, x, columns, rstd, norm_weight, input_scale, GATED: tl.constexpr
):
    """Row `token` of z [M, COUNT]: x~ of the first `listed` of these channels, zero for the others. Registers cannot
    be indexed, so the few values are read and prepared again."""
    at = tl.arange(0, triton.next_power_of_2(COUNT))
    channel = tl.load(channels + at, at < listed, other=columns)
    here = channel < columns
    value = _prepare(x, channel, here, columns, rstd, norm_weight, input_scale, GATED)
    tl.store(z + token * COUNT + at, tl.where(here, value, tl.zeros_like(value)), at < COUNT)


@triton.jit
def _round(value, scale, reach, OUTLIERS: tl.constexpr, CODES: tl.constexpr):
    """Codes; with dynamic outlier channels points of the grid, and the values beyond its reach as they are."""
    wide = value.to(tl.float32)
    shifted = _divide(wide, scale) + _ROUNDER
    if CODES.is_int8():
        made = shifted.to(tl.int32, bitcast=True).to(CODES)
    elif OUTLIERS == 0:
        made = (shifted - _ROUNDER).to(CODES)
    else:
        made = tl.where(tl.abs(wide) <= reach, ((shifted - _ROUNDER) * scale).to(CODES), value)
    return made


@triton.jit
def _divide(value, divisor):
    """value / divisor, rounded as IEEE 754 demands, where neither it nor the remainder leaves the normal range.

    Many values have one divisor: its correctly rounded inverse and one step of correction give the quotient (theorem
    of Markstein) in three instructions, where div.rn has a dozen and a branch.
    """
    if INTERPRET:  # where fma may round twice
        return tl.div_rn(value, divisor)
    inverse = tl.div_rn(1.0, divisor)
    quotient = value * inverse
    remainder = tl.fma(-quotient, divisor, value)
    return tl.fma(remainder, inverse, quotient)


@triton.jit
def _as_float(magnitude, DTYPE: tl.constexpr):
    """The fp32 value of the lower 15 bits of a 16-bit float."""
    return magnitude.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.constexpr_function
def _parts(outliers: int, block: int) -> int:
    """More than half of a block is columns, so more than half of the parts hold one."""
    return min(2 * triton.next_power_of_2(outliers + 1), block)


@triton.jit
def _largest_rounded(magnitude, columns, OUTLIERS: tl.constexpr, BLOCK: tl.constexpr):
    """The (OUTLIERS + 1)-th largest magnitude, as bits: by bisection, for bits of positive floats are in their order.

    The row is cut into parts, more than OUTLIERS of them not padding alone. Each of these has a value that reaches the
    smallest of their maxima, which is close enough to begin with: half the steps of a start at zero. Ties need no
    care: those of the largest rounded value are points of the grid.
    """
    PARTS: tl.constexpr = _parts(OUTLIERS, BLOCK)
    SIZE: tl.constexpr = BLOCK // PARTS
    largest = tl.max(tl.reshape(magnitude, [PARTS, SIZE]), 1)
    low = tl.min(tl.where(tl.arange(0, PARTS) * SIZE < columns, largest, 0x7FFF), 0)
    high = tl.max(largest, 0) + 1
    # Two to a word, each below a set bit that the subtraction of a larger number clears.
    even, odd = tl.split(tl.reshape(magnitude.to(tl.uint32), [BLOCK // 2, 2]))
    pairs = even | (odd << 16) | 0x80008000
    while high - low > 1:
        middle = (low + high) >> 1
        counts = tl.sum(((pairs - middle.to(tl.uint32) * 0x10001) >> 15) & 0x10001, 0)
        reaching = (counts & 0xFFFF) + (counts >> 16)
        low = tl.where(reaching > OUTLIERS, middle, low)
        high = tl.where(reaching > OUTLIERS, high, middle)
    return low
