"""The quantized linear for many tokens: weights are dequantized once, and cuBLAS multiplies.

The fused kernel unpacks each weight once for each tile of tokens. From about a thousand tokens on it costs less to
write the weights out once, a slab of rows at a time, so that the scratch memory stays small. All branches together are
one more product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qe_kernels.layout import TILE_ROWS, Weight
from qe_kernels.linear import Branch, dense_up, dequantize

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
        pairs = [_side_by_side(branch, expert, out_dtype) for branch in branches]
        z, up = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
        y.addmm_(z, up.T)
    return y if bias is None else y.add_(bias)


def _slabs(weight: Weight) -> Iterator[tuple[slice, Weight]]:
    """Rows, and the weight of these rows."""
    tiles = max(1, SLAB // (weight.columns * TILE_ROWS))
    for first in range(0, weight.row_tiles, tiles):
        rows = slice(first * TILE_ROWS, min((first + tiles) * TILE_ROWS, weight.rows))
        planes = tuple(plane[first : first + tiles] for plane in weight.planes)
        yield (
            rows,
            replace(weight, planes=planes, scale=weight.scale[:, rows].contiguous(), rows=rows.stop - rows.start),
        )


def _side_by_side(branch: Branch, expert: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """z [M, R'] and up [N, R'] of all experts, z zero but for the token's own."""
    up, z = dense_up(branch, dtype), branch.z.to(dtype)
    if branch.experts is None:
        return z, up
    own = expert[:, None] == torch.arange(branch.experts, device=expert.device)
    chosen = torch.where(own[..., None], z if z.dim() == 3 else z[:, None], 0)
    return chosen.flatten(1), up.transpose(0, 1).flatten(1)
