"""Device functions that load a tile of a `layout.Weight` as integers, into the registers of the threads that need them.

There are two ways, which give identical integers: inline assembly for 4 bits, and plain Triton for all widths and for
the interpreter, which knows no assembly. In both, the columns come back to natural order by reshapes that only rename
registers; the load then takes over the fragment's layout, and Hopper's tensor cores read the weights from registers.
"""

import triton
import triton.language as tl

from qe_kernels import layout

COMPILED = not triton.knobs.runtime.interpret

code_factor = triton.constexpr_function(layout.code_factor)
_field_widths = triton.constexpr_function(layout.field_widths)


@triton.constexpr_function
def _width(bits: int, plane: int) -> int:
    """0 where the format has fewer planes."""
    return (*_field_widths(bits), 0, 0)[plane]


def _nibbles_to_floats(packed: str, exponent: int, one: int, minus_offset: int) -> str:
    """Four nibbles n of each of two 16-bit units -> 2 x 4 floats, exactly.

    The nibble replaces the lowest bits of a power of two p whose unit in the last place is 1, and flipping its sign
    bit makes it p + 8 + n. To subtract p + 8, fma serves where sub of bf16 does not exist (before sm_90).
    """
    floats = [f"lop3.b32 ${i}, w{i}, 0x000f000f, {exponent:#010x}, 0x6a;" for i in range(4)]  # (w & mask) ^ exponent
    exact = [f"fma.rn.{packed} ${i}, ${i}, one, offset;" for i in range(4)]
    return "\n".join(
        [
            "{ .reg .b32 w0, w1, w2, w3, one, offset;",
            f"mov.b32 one, {one:#010x}; mov.b32 offset, {minus_offset:#010x};",
            "mov.b32 w0, $4; shr.u32 w1, $4, 4; shr.u32 w2, $4, 8; shr.u32 w3, $4, 12;",
            *floats,
            *exact,
            "}",
        ]
    )


NIBBLES_TO_BF16 = tl.constexpr(_nibbles_to_floats("bf16x2", 0x43084308, 0x3F803F80, 0xC308C308))
NIBBLES_TO_FP16 = tl.constexpr(_nibbles_to_floats("f16x2", 0x64086408, 0x3C003C00, 0xE408E408))
# Two nibbles of each of four bytes to the upper half of a byte.
NIBBLES_TO_INT8 = tl.constexpr(
    "{ .reg .b32 low; shl.b32 low, $2, 4; and.b32 $0, low, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0; }"
)


@triton.jit
def load_weight(
    plane0,
    plane1,
    plane2,
    row,
    column,
    row_tiles,
    column_tiles,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    WGMMA: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr = COMPILED,
):
    """The codes of rows row .. row + BN - 1 and columns column .. column + BK - 1, times `code_factor`: DTYPE [BN, BK].

    plane0..2: `Weight.three_planes`; row, column: int32 scalars, multiples of BN and BK (of 64 and 128 where these are
    larger); row_tiles, column_tiles: of the Weight. BN, BK: powers of two; under WGMMA, BK is at least 128 / width of
    the narrowest plane. DTYPE: tl.int8 for a Weight of the int8 tensor cores; for the others tl.bfloat16, tl.float16,
    or tl.float32 under the interpreter. Beyond the padded matrix the values are some other codes, always finite:
    rows there must not be stored, and inputs there must be zero.
    """
    LANES: tl.constexpr = 4 if DTYPE.is_int8() else 2
    WIDTH0: tl.constexpr = _width(BITS, 0)
    WIDTH1: tl.constexpr = _width(BITS, 1)
    WIDTH2: tl.constexpr = _width(BITS, 2)
    units = _load_units(plane0, row, column, row_tiles, column_tiles, BN, BK, WIDTH0, WGMMA, LANES)
    if ASM and BITS == 4:
        return _natural(_split_nibbles(units, DTYPE), BK, WGMMA, LANES)
    codes = _natural(_split(units, WIDTH0, LANES), BK, WGMMA, LANES)
    if WIDTH1 > 0:
        units = _load_units(plane1, row, column, row_tiles, column_tiles, BN, BK, WIDTH1, WGMMA, LANES)
        codes |= _natural(_split(units, WIDTH1, LANES), BK, WGMMA, LANES) << WIDTH0
    if WIDTH2 > 0:
        units = _load_units(plane2, row, column, row_tiles, column_tiles, BN, BK, WIDTH2, WGMMA, LANES)
        codes |= _natural(_split(units, WIDTH2, LANES), BK, WGMMA, LANES) << (WIDTH0 + WIDTH1)
    top = (codes << (8 - BITS)).to(tl.int8, bitcast=True)
    if DTYPE.is_int8():
        return top
    return (top >> (8 - BITS)).to(DTYPE)


@triton.jit
def _load_units(
    plane,
    row,
    column,
    row_tiles,
    column_tiles,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDTH: tl.constexpr,
    WGMMA: tl.constexpr,
    LANES: tl.constexpr,
):
    """A tile of a plane in its own order: uint16 (two lanes) or uint8 (four) [BN, BK * WIDTH / bits of a unit].

    No mask, for masks keep cp.async from vectorising: tiles beyond the last are read as the last.
    """
    UNIT: tl.constexpr = 32 // LANES
    RUN: tl.constexpr = 128 * WIDTH // UNIT
    COLUMNS: tl.constexpr = min(BK, 128)
    USED: tl.constexpr = RUN * COLUMNS // 128
    QUARTER: tl.constexpr = USED // 4
    first = (row // 64).to(tl.int64) * column_tiles + column // 128
    start = plane.to(tl.pointer_type(tl.uint16 if LANES == 2 else tl.uint8)) + first * (64 * RUN)

    rows = row % 64 + tl.arange(0, BN)
    units = tl.arange(0, BK * WIDTH // UNIT)
    tile_row = tl.minimum(rows // 64, row_tiles - 1 - row // 64) if BN > 64 else rows // 64
    tile_column = tl.minimum(units // USED, column_tiles - 1 - column // 128) if BK > 128 else units // USED
    unit = units % USED
    if BK < 128:
        part = column % 128 // BK
        if WGMMA:  # of every quarter
            tl.static_assert(BK * WIDTH >= 128, "BK is too small for this width")
            unit = unit // QUARTER * (RUN // 4) + unit % QUARTER
            start += part * QUARTER
        else:
            start += part * USED
    offsets = ((tile_row * column_tiles * 64 + rows % 64) * RUN)[:, None] + (tile_column * (64 * RUN) + unit)[None, :]
    return tl.load(start + offsets, eviction_policy="evict_first")


@triton.jit
def _natural(fields, BK: tl.constexpr, WGMMA: tl.constexpr, LANES: tl.constexpr):
    """[BN, units, fields of a unit] in a plane's order -> [BN, BK] in the matrix's."""
    BN: tl.constexpr = fields.shape[0]
    FIELDS: tl.constexpr = fields.shape[2]
    COLUMNS: tl.constexpr = min(BK, 128)
    WORDS: tl.constexpr = BK // (LANES * FIELDS)
    if WGMMA:
        TILES: tl.constexpr = BK // COLUMNS
        ordered = fields.reshape(BN, TILES, 4, WORDS // (4 * TILES), LANES, FIELDS).trans(0, 1, 3, 5, 2, 4)
    else:
        ordered = fields.reshape(BN, WORDS, LANES, FIELDS).trans(0, 1, 3, 2)
    return ordered.reshape(BN, BK)


@triton.jit
def _split_nibbles(units, DTYPE: tl.constexpr):
    """[BN, units] -> DTYPE [BN, units, nibbles of a unit], by assembly: one 32-bit register at a time.

    Every unit gives its own nibbles only, so any assignment of units to registers is right.
    """
    if DTYPE.is_int8():
        low, high = tl.inline_asm_elementwise(
            NIBBLES_TO_INT8, "=r,=r,r", [units], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
        return tl.join(low, high)
    else:
        FLOAT = tl.bfloat16 if DTYPE.is_bf16() else tl.float16
        f0, f1, f2, f3 = tl.inline_asm_elementwise(
            NIBBLES_TO_BF16 if DTYPE.is_bf16() else NIBBLES_TO_FP16,
            "=r,=r,=r,=r,r",
            [units],
            dtype=(FLOAT, FLOAT, FLOAT, FLOAT),
            is_pure=True,
            pack=2,
        )
        pairs = tl.join(tl.join(f0, f2), tl.join(f1, f3))  # [BN, units, 2, 2]: nibble 2i + j at [i, j]
        return pairs.reshape(units.shape[0], units.shape[1], 4)


@triton.jit
def _split(units, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """[BN, units] -> uint8 [BN, units, fields of a unit], lowest bits first, by halving."""
    BN: tl.constexpr = units.shape[0]
    UNITS: tl.constexpr = units.shape[1]
    UNIT: tl.constexpr = 32 // LANES
    parts = units
    if UNIT == 16:
        parts = _halve(parts, 8)
    parts = parts.to(tl.uint8)
    if WIDTH <= 4:
        parts = _halve(parts, 4)
    if WIDTH <= 2:
        parts = _halve(parts, 2)
    if WIDTH == 1:
        parts = _halve(parts, 1)
    return parts.reshape(BN, UNITS, UNIT // WIDTH)


@triton.jit
def _halve(parts, BITS: tl.constexpr):
    """[R, C] of 2 * BITS bits each -> [R, 2 * C] of BITS bits, the lower half first."""
    MASK: tl.constexpr = 2**BITS - 1
    return tl.join(parts & MASK, parts >> BITS).reshape(parts.shape[0], 2 * parts.shape[1])
