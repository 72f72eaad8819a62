"""What a kernel's tile of weights holds: the checkpoint's integers, whatever the format, the order and the tile."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qe_kernels import unpack
from qe_kernels.layout import Order, code_factor, field_widths, pack_weight

from qe_dist.numerics.packing import pack
from tests.kernels.gemm import codes as codes_kernel
from tests.kernels.gemm import gemm
from tests.kernels.test_layout import random_codes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float16, torch.bfloat16 if DEVICE == "cuda" else torch.float32]
"""The interpreter's products of bfloat16 are wrong, so kernels take float32 in its place."""


def packed(codes, bits, order, int8):
    words = pack(codes, bits).to(DEVICE)
    return pack_weight(words, bits, torch.ones(len(codes), 1, device=DEVICE), codes.shape[1], order, int8)


def loaded(weight, dtype, BN, BK, grid, first=(0, 0)):
    """The tiles that a grid of programs loads, side by side."""
    out = torch.full((grid[0] * BN, grid[1] * BK), -77, dtype=dtype, device=DEVICE)
    codes_kernel[grid](
        *weight.three_planes, out, weight.row_tiles, weight.column_tiles, *first,
        BN=BN, BK=BK, BITS=weight.bits, WGMMA=weight.order is Order.WGMMA,
    )  # fmt: skip
    return out.cpu()


def tile_fits(bits, order, BK):
    return order is Order.NATURAL or min(field_widths(bits)) * BK >= 128


@settings(max_examples=40)
@given(
    bits=st.integers(2, 8),
    order=st.sampled_from(Order),
    dtype=st.sampled_from([torch.int8, *FLOATS]),
    rows=st.integers(1, 200),
    columns=st.integers(1, 400),
    BN=st.sampled_from([16, 64, 128, 256]),
    BK=st.sampled_from([32, 64, 128, 256]),
)
def test_tiles_hold_the_codes(bits, order, dtype, rows, columns, BN, BK):
    if not tile_fits(bits, order, BK):
        BK = 128
    int8 = dtype == torch.int8
    codes = random_codes(rows, columns, bits)
    tiles = loaded(packed(codes, bits, order, int8), dtype, BN, BK, (-(-rows // BN), -(-columns // BK)))
    expected = codes.double() * code_factor(bits, int8)
    assert torch.equal(tiles[:rows, :columns].double(), expected)


@pytest.mark.parametrize("order", Order)
def test_padding_is_zero(order):
    tiles = loaded(packed(random_codes(3, 5, 4), 4, order, False), torch.float16, 64, 128, (1, 1))
    assert not tiles[3:].any()
    assert not tiles[:, 5:].any()


@pytest.mark.parametrize("order", Order)
def test_beyond_the_last_tile_the_last_is_read_again(order):
    """Nothing outside the plane is touched: what lies there may belong to no one."""
    codes = random_codes(192, 128 * 3, 4)
    tiles = loaded(packed(codes, 4, order, False), torch.float16, 128, 256, (2, 2))
    expected = torch.cat((codes, codes[128:]))
    expected = torch.cat((expected, expected[:, 256:]), dim=1)
    assert torch.equal(tiles, expected.half())


@pytest.mark.parametrize("BK", [32, 64])
@pytest.mark.parametrize("order", Order)
def test_a_too_narrow_tile_is_refused(order, BK):
    """A thread's share of it is less than one word: 64 columns of 1 bit under WGMMA."""
    weight = packed(random_codes(64, 128, 3), 3, order, False)
    if order is Order.NATURAL:
        loaded(weight, torch.float16, 64, BK, (1, 1))
    else:
        with pytest.raises(Exception, match="BK is too small for this width"):
            loaded(weight, torch.float16, 64, BK, (1, 1))


@pytest.mark.skipif(DEVICE == "cuda", reason="relies on memory that is only reserved until it is touched")
def test_offsets_beyond_two_to_the_31():
    codes = random_codes(64, 128, 4)
    weight = packed(codes, 4, Order.WGMMA, True)
    tiles = 2**31 // 4096 + 2
    plane = torch.empty(tiles, 1, 64, 64, dtype=torch.uint8)
    plane[-1] = weight.planes[0][0]
    out = torch.empty(64, 128, dtype=torch.int8)
    codes_kernel[(1, 1)](plane, plane, plane, out, tiles, 1, (tiles - 1) * 64, 0, BN=64, BK=128, BITS=4, WGMMA=True)
    assert torch.equal(out, codes * 16)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("dtype", [torch.int8, *FLOATS])
def test_a_product_with_the_weights_on_the_left(dtype, order, bits):
    """Integers below 2^11 in all partial sums: exact in every format."""
    codes, x = random_codes(70, 256, bits), random_codes(5, 256, 2, seed=1)
    weight = packed(codes, bits, order, dtype == torch.int8)
    y = torch.full((5, 70), -77, dtype=torch.int32 if dtype == torch.int8 else torch.float32, device=DEVICE)
    gemm[(2, 1)](
        x.to(dtype).to(DEVICE), *weight.three_planes, y, 5, 70, 256, weight.row_tiles, weight.column_tiles,
        BN=64, BM=16, BK=128, BITS=bits, WGMMA=order is Order.WGMMA,
    )  # fmt: skip
    assert torch.equal(y.cpu().double(), x.double() @ codes.double().T * code_factor(bits, dtype == torch.int8))


# The interpreter knows no assembly, so here is one that does.

MASK = 0xFFFFFFFF


def fma(dtype, a, b, c):
    """Two 16-bit floats in each int64; exact before its one rounding, for doubles hold any product of two."""

    def halves(register):
        pairs = torch.stack((register & 0xFFFF, register >> 16), dim=-1)
        return pairs.to(torch.uint16).view(dtype).double()

    bits = (halves(a) * halves(b) + halves(c)).to(dtype).view(torch.int16).long() & 0xFFFF
    return bits[..., 0] | bits[..., 1] << 16


def lop3(a, b, c, table):
    result = torch.zeros_like(a)
    for minterm in range(8):
        if table >> minterm & 1:
            result |= (a if minterm & 4 else ~a) & (b if minterm & 2 else ~b) & (c if minterm & 1 else ~c)
    return result & MASK


OPCODES = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: (a << n) & MASK,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lambda a, b, c, table: lop3(a, b, c, int(table[0])),
    "fma.rn.bf16x2": lambda a, b, c: fma(torch.bfloat16, a, b, c),
    "fma.rn.f16x2": lambda a, b, c: fma(torch.float16, a, b, c),
}


def run(assembly, registers):
    """`registers` by name, as int64 tensors; returned with all that the assembly wrote."""
    registers = dict(registers)
    some = next(iter(registers.values()))
    for statement in re.sub(r"[{}]|\.reg .*?;", " ", assembly).split(";")[:-1]:
        opcode, operands = statement.split(maxsplit=1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [registers[s] if s in registers else torch.full_like(some, int(s, 0)) for s in sources]
        registers[target] = OPCODES[opcode](*values)
    return registers


@pytest.fixture(scope="module")
def registers():
    """$1, $2, $3: fields, and anything beside them."""
    generator = torch.Generator().manual_seed(0)
    return {f"${i}": torch.randint(2**32, (2**17,), generator=generator) for i in (1, 2, 3)}


def joined(lanes, bits, low):
    """Signed codes from the fields that begin at bit `low` of each plane's lanes."""
    code, below = 0, 0
    for lane, width in zip(lanes, field_widths(bits), strict=False):
        code = code | (lane >> low(width) & (2**width - 1)) << below
        below += width
    return (code ^ 2 ** (bits - 1)) - 2 ** (bits - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", range(2, 8))
def test_assembly_merges_fields_to_floats(bits, dtype, registers):
    result = run(unpack.merge_to_floats(bits, dtype == torch.bfloat16), registers)["$0"]
    for shift in (0, 16):
        value = (result >> shift & 0xFFFF).to(torch.uint16).view(dtype)
        expected = joined([registers[f"${i}"] >> shift & 0xFFFF for i in (1, 2, 3)], bits, low=lambda width: 0)
        assert torch.equal(value.double(), expected.double())


@pytest.mark.parametrize("bits", range(2, 8))
def test_assembly_merges_fields_to_int8(bits, registers):
    result = run(unpack.merge_to_int8(bits), registers)["$0"]
    for shift in (0, 8, 16, 24):
        value = (result >> shift & 0xFF).to(torch.uint8).view(torch.int8)
        expected = joined([registers[f"${i}"] >> shift & 0xFF for i in (1, 2, 3)], bits, low=lambda width: 8 - width)
        assert torch.equal(value.long(), expected * code_factor(bits, True))
