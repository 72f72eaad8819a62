"""Device functions that load a tile of a `layout.Weight` as integers, into the registers of the threads that need them.

There are two ways, which give identical integers: inline assembly, which treats all values of a 32-bit register at
once, and plain Triton, for the interpreter, which knows no assembly. In both, the columns come back to natural order by
joins and reshapes that only rename registers; so the load takes over the layout of the tensor core's fragment, and
Hopper multiplies from registers, with no way back through shared memory.

A field comes to the lowest bits of a 16-bit lane, or to the highest bits of an 8-bit one; what lies beside it is
masked at the end. Four bits cost 11 instructions for 8 weights of 16 bits, and 3 for 8 weights of int8.
"""

from qe_kernels import layout
from qe_kernels.triton_if_any import INTERPRET, tl, triton

COMPILED = not INTERPRET.value

code_factor = triton.constexpr_function(layout.code_factor)
_field_widths = triton.constexpr_function(layout.field_widths)


@triton.constexpr_function
def _width(bits: int, plane: int) -> int:
    """0 where the format has fewer planes."""
    return (*_field_widths(bits), 0, 0)[plane]


@triton.constexpr_function
def merge_to_floats(bits: int, bf16: bool) -> str:
    """Assembly: $0 = two bf16 or fp16 codes, from fields in the lowest bits of the lanes of $1, $2, $3.

    The code n, with its sign bit flipped, takes the lowest bits of a power of two p whose unit in the last place is 1:
    a float p + 2^(b-1) + n. That minus p + 2^(b-1) is exact. (By fma: before sm_90, bf16 has no sub.)
    """
    kind, one, power = ("bf16x2", 0x3F80, 0x4300) if bf16 else ("f16x2", 0x3C00, 0x6400)
    offset = power | 2 ** (bits - 1)
    lines, low = [f"mov.b32 x, {offset * 0x10001:#x};"], 0
    for plane, width in enumerate(_field_widths(bits), start=1):
        mask = (2**width - 1 << low) * 0x10001
        lines += [f"shl.b32 field, ${plane}, {low};", f"lop3.b32 x, field, {mask:#x}, x, 0x6a;"]  # (field & mask) ^ x
        low += width
    lines += [f"mov.b32 one, {one * 0x10001:#x};", f"mov.b32 minus, {(offset | 0x8000) * 0x10001:#x};"]
    return "\n".join(["{ .reg .b32 x, field, one, minus;", *lines, f"fma.rn.{kind} $0, x, one, minus;", "}"])


@triton.constexpr_function
def merge_to_int8(bits: int) -> str:
    """Assembly: $0 = four codes in the highest bits of their bytes, from fields in the highest bits of $1, $2, $3."""
    lines, low = ["mov.b32 x, 0;"], 8 - bits
    for plane, width in enumerate(_field_widths(bits), start=1):
        mask = (2**width - 1 << low) * 0x01010101
        shift = 8 - width - low
        lines += [f"shr.u32 field, ${plane}, {shift};", f"lop3.b32 x, field, {mask:#x}, x, 0xea;"]  # (field & mask) | x
        low += width
    return "\n".join(["{ .reg .b32 x, field;", *lines, "mov.b32 $0, x;", "}"])


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

    plane0..2: `Weight.three_planes`; row, column: int32 scalars, multiples of BN and BK; row_tiles, column_tiles: of
    the Weight. BN, BK: powers of two, BN at least 16 and BK at least 32; under WGMMA, BK is also at least 128 / width
    of the narrowest plane. DTYPE: tl.int8 for a Weight of the int8 tensor cores; for the others tl.bfloat16,
    tl.float16, or tl.float32 without assembly. Beyond the padded matrix the values are some other codes, always
    finite: rows there must not be stored, and inputs there must be zero.
    """
    LANES: tl.constexpr = 4 if DTYPE.is_int8() else 2
    WIDTH0: tl.constexpr = _width(BITS, 0)
    WIDTH1: tl.constexpr = _width(BITS, 1)
    WIDTH2: tl.constexpr = _width(BITS, 2)
    field0 = _load_fields(plane0, row, column, row_tiles, column_tiles, BN, BK, WIDTH0, WGMMA, LANES, ASM)
    field1 = field0
    field2 = field0
    if WIDTH1 > 0:
        field1 = _load_fields(plane1, row, column, row_tiles, column_tiles, BN, BK, WIDTH1, WGMMA, LANES, ASM)
    if WIDTH2 > 0:
        field2 = _load_fields(plane2, row, column, row_tiles, column_tiles, BN, BK, WIDTH2, WGMMA, LANES, ASM)

    if ASM and BITS < 8:  # bytes are whole as they are, and would not fit beside the exponent of a bf16
        MERGE: tl.constexpr = merge_to_int8(BITS) if LANES == 4 else merge_to_floats(BITS, DTYPE.is_bf16())
        return tl.inline_asm_elementwise(
            MERGE, "=r,r,r,r", [field0, field1, field2], dtype=DTYPE.value, is_pure=True, pack=LANES
        )
    codes = _lowest(field0, WIDTH0, LANES)
    if WIDTH1 > 0:
        codes |= _lowest(field1, WIDTH1, LANES) << WIDTH0
    if WIDTH2 > 0:
        codes |= _lowest(field2, WIDTH2, LANES) << (WIDTH0 + WIDTH1)
    highest = (codes << (8 - BITS)).to(tl.int8, bitcast=True)
    return highest if LANES == 4 else (highest >> (8 - BITS)).to(DTYPE)


@triton.jit
def _load_fields(
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
    ASM: tl.constexpr,
):
    """The fields of one plane in lanes of 16 or 8 bits, in natural order: uint16 or uint8 [BN, BK].

    Loaded without a mask, for masks keep cp.async from vectorising: tiles beyond the last are read as the last.
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
    fields = tl.load(start + offsets, eviction_policy="evict_first")

    if LANES == 2:
        fields = _halve(fields, 8, LANES, ASM)
    if WIDTH <= 4:
        fields = _halve(fields, 4, LANES, ASM)
    if WIDTH <= 2:
        fields = _halve(fields, 2, LANES, ASM)
    if WIDTH == 1:
        fields = _halve(fields, 1, LANES, ASM)

    FIELDS: tl.constexpr = UNIT // WIDTH
    WORDS: tl.constexpr = BK // (LANES * FIELDS)
    if WGMMA:
        TILES: tl.constexpr = BK // COLUMNS
        fields = fields.reshape(BN, TILES, 4, WORDS // (4 * TILES), LANES, FIELDS).trans(0, 1, 3, 5, 2, 4)
    else:
        fields = fields.reshape(BN, WORDS, LANES, FIELDS).trans(0, 1, 3, 2)
    return fields.reshape(BN, BK)


@triton.jit
def _halve(x, BITS: tl.constexpr, LANES: tl.constexpr, ASM: tl.constexpr):
    """[R, C] -> [R, 2 * C]: the lower and the upper BITS of fields of 2 * BITS, each where the field was."""
    if LANES == 2:  # in the lowest bits
        if ASM:
            upper = tl.inline_asm_elementwise(
                f"shr.u32 $0, $1, {BITS};", "=r,r", [x], dtype=tl.uint16, is_pure=True, pack=2
            )
        else:
            upper = x >> BITS
        pair = tl.join(x, upper)
    else:
        if ASM:
            lower = tl.inline_asm_elementwise(
                f"shl.b32 $0, $1, {BITS};", "=r,r", [x], dtype=tl.uint8, is_pure=True, pack=4
            )
        else:
            lower = x << BITS
        pair = tl.join(lower, x)
    return pair.reshape(x.shape[0], 2 * x.shape[1])


@triton.jit
def _lowest(fields, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """uint8, with the field in its lowest bits and nothing beside it."""
    return fields >> (8 - WIDTH) if LANES == 4 else (fields & (2**WIDTH - 1)).to(tl.uint8)
