"""The smallest kernels that use `load_weight`: they show what it gives, and how it compiles."""

import triton
import triton.language as tl
from qe_kernels.unpack import COMPILED, load_weight


@triton.jit
def codes(
    plane0,
    plane1,
    plane2,
    out,
    row_tiles,
    column_tiles,
    first_row,
    first_column,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    WGMMA: tl.constexpr,
    ASM: tl.constexpr = COMPILED,
):
    """out [programs in n, BN, programs in k, BK]: the tiles from first_row and first_column on."""
    n = tl.program_id(0)
    k = tl.program_id(1)
    row = first_row + n * BN
    column = first_column + k * BK
    tile = load_weight(
        plane0, plane1, plane2, row, column, row_tiles, column_tiles, BN, BK, BITS, WGMMA, out.dtype.element_ty, ASM
    )
    width = tl.num_programs(1) * BK
    rows = n * BN + tl.arange(0, BN)
    columns = k * BK + tl.arange(0, BK)
    tl.store(out + rows[:, None] * width + columns[None, :], tile)


@triton.jit
def gemm(
    x,
    plane0,
    plane1,
    plane2,
    y,
    M,
    N,
    K,
    row_tiles,
    column_tiles,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    WGMMA: tl.constexpr,
    ASM: tl.constexpr = COMPILED,
):
    """y [M, N] = x [M, K] W^T with the weights as the left operand: acc [BN, BM] = W [BN, BK] x^T [BK, BM]."""
    row = tl.program_id(0) * BN
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = tl.zeros([BN, BM], tl.int32 if x.dtype.element_ty.is_int8() else tl.float32)
    for column in range(0, K, BK):
        weight = load_weight(
            plane0, plane1, plane2, row, column, row_tiles, column_tiles, BN, BK, BITS, WGMMA, x.dtype.element_ty, ASM
        )
        inputs = tl.load(x + token[None, :] * K + (column + tl.arange(0, BK))[:, None], token[None, :] < M, 0)
        acc = tl.dot(weight, inputs, acc, out_dtype=acc.dtype)
    rows = row + tl.arange(0, BN)
    tl.store(y + token[None, :] * N + rows[:, None], acc, (rows[:, None] < N) & (token[None, :] < M))
