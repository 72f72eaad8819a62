"""The quantized linear for many tokens: weights are dequantized once, and cuBLAS multiplies.

The fused kernel unpacks each weight once for each tile of tokens. From about a thousand tokens on it costs less to
write the weights out once, a slab of rows at a time, so that the scratch memory stays small. All branches together are
one more product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qe_kernels.branches import Branch
from qe_kernels.dispatch import depths
from qe_kernels.launch import Launch
from qe_kernels.layout import TILE_ROWS, Order, Weight, code_factor, unpack_weight
from qe_kernels.scales import load_scales, scale_weights, scaled
from qe_kernels.triton_if_any import INTERPRET, tl, triton
from qe_kernels.unpack import load_weight

SLAB = 2**26
"""Weights that are dequantized at a time: 128 MiB, and still enough rows for all of a GPU."""


def linear_on_dense_weight(
    base: Tensor,
    token_scale: Tensor | None,
    weight: Weight,
    branches: Sequence[Branch] = (),
    expert: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [M, N]; arguments as `linear_reference` takes them. The token scales multiply the codes and not the products,
    which could overflow fp16."""
    x = (base if token_scale is None else base * token_scale[:, None]).to(out_dtype)
    y = torch.empty(len(x), weight.rows, dtype=out_dtype, device=x.device)
    for rows, slab in _slabs(weight):
        torch.mm(x, dequantize(slab, out_dtype).T, out=y[:, rows])
    if branches:
        z = torch.cat([branch.z_side_by_side(expert, out_dtype) for branch in branches], dim=1)
        ups = [branch.up if isinstance(branch.up, Tensor) else dequantize(branch.up, out_dtype) for branch in branches]
        y.addmm_(z, torch.cat(ups, dim=1).T)
    return y if bias is None else y.add_(bias)


def compile_dense(weight: Weight, branches: Sequence[Branch], dtype: torch.dtype) -> None:
    """All that `linear_on_dense_weight` may launch."""
    ups = [branch.up for branch in branches if isinstance(branch.up, Weight)]
    for part in (*(slab for _, slab in _slabs(weight)), *ups):
        launch, arguments = _dequantizer(part, torch.empty(1, dtype=dtype, device=part.scale.device))
        launch.compile(arguments)


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """codes * scale, [N, K] in `dtype` (bf16 or fp16), for products so large that cuBLAS wins."""
    out = torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.scale.device)
    launch, arguments = _dequantizer(weight, out)
    launch((triton.cdiv(weight.rows, 64), triton.cdiv(weight.columns, max(depths(weight))), 1), arguments)
    return out


def _dequantizer(weight: Weight, out: Tensor) -> tuple[Launch, tuple[Any, ...]]:
    constants = (
        weight.bits, weight.order is Order.WGMMA, weight.int8, code_factor(weight.bits, weight.int8),
        weight.group_size or 128 * weight.column_tiles, 64, max(depths(weight)),
    )  # fmt: skip
    sizes = (weight.rows, weight.columns, weight.row_tiles, weight.column_tiles)
    return Launch(_dequantize, constants, 4), (weight.three_planes, weight.scale, out, *sizes)


def dequantize_reference(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The same in plain torch."""
    return scaled(*unpack_weight(weight), weight, torch.float32).to(dtype)


def _slabs(weight: Weight) -> Iterator[tuple[slice, Weight]]:
    """Rows, and the weight of these rows."""
    tiles = max(1, SLAB // (weight.columns * TILE_ROWS))
    for first in range(0, weight.row_tiles, tiles):
        rows = slice(first * TILE_ROWS, min((first + tiles) * TILE_ROWS, weight.rows))
        planes = tuple(plane[first : first + tiles] for plane in weight.planes)
        scale = weight.scale[:, rows].contiguous()
        yield rows, replace(weight, planes=planes, scale=scale, rows=rows.stop - rows.start)


@triton.jit
def _dequantize(
    planes, scale, dense, N, K, row_tiles, column_tiles,
    BITS: tl.constexpr, WGMMA: tl.constexpr, INT8: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    w = load_weight(
        planes[0], planes[1], planes[2], tl.program_id(0) * BN, tl.program_id(1) * BK, row_tiles, column_tiles,
        BN, BK, BITS, WGMMA, tl.int8 if INT8 else tl.float32 if INTERPRET else dense.dtype.element_ty,
    )  # fmt: skip
    scales = load_scales(scale, rows, tl.program_id(1) * BK, N, K, GROUP, min(GROUP, BK), BK)
    w = scale_weights(w.to(tl.float32), scales.to(tl.float32) * (1.0 / FACTOR))
    place = dense + rows.to(tl.int64)[:, None] * K + columns[None, :]
    tl.store(place, w.to(dense.dtype.element_ty), mask=(rows < N)[:, None] & (columns < K)[None, :])
