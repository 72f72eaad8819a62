"""What a linear adds to its quantized product: low-rank repair and columns of 16 bits, shared or of routed experts.

    y += z up^T        z [M, R] of the token, up [N, R] of the layer; of experts only the token's own columns count

All experts of a branch stand side by side in one matrix up [N, E R], as every expert's z does in [M, E R]: a chunk of
columns is one more step of the linear's loop over K, whichever experts it holds. `pack_up` makes that matrix at load,
once: ranks are filled up with zeros, so that nothing is masked along them, and integers lie as the weights do, so that
they are copied by 16 bytes and unpacked in registers as weights are.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from qe_kernels.factors import Factor, padded_columns, padded_rank, padded_up
from qe_kernels.layout import Order, Weight, pack_weight, unpack_weight
from qe_kernels.products import dot
from qe_kernels.scales import load_scales, scale_weights, scaled
from qe_kernels.triton_if_any import INTERPRET, tl, triton
from qe_kernels.unpack import load_weight

MAX_EXPERTS = 32
"""Experts of a routed branch at most: a tile keeps the experts that it needs as bits of one integer."""

Up = Tensor | Weight
"""[N, C] of 16 bits, or of integers a Weight whose scale group is an expert's rank; C: E times the rank, filled up."""


@dataclass(frozen=True)
class Branch:
    """z up^T beside the quantized product."""

    z: Tensor
    """[M, R], R a padded rank; of experts [M, E, R], or [M, R] where it holds the chosen expert's already. Of 16 bits.
    Only what belongs to a token's own expert is read."""
    up: Up
    """What `pack_up` makes of a factor."""
    experts: int | None = None
    """None: shared by all tokens."""

    @property
    def rank(self) -> int:
        """The rank of one expert, or of the shared pair."""
        return self.z.shape[-1]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """up [N, C] as numbers."""
        if isinstance(self.up, Tensor):
            return self.up.to(dtype)
        return scaled(*unpack_weight(self.up), self.up, dtype)

    def z_side_by_side(self, expert: Tensor | None, dtype: torch.dtype) -> Tensor:
        """z [M, C]: zero but for the token's own expert."""
        z = self.z.to(dtype)
        if self.experts is not None:
            assert expert is not None, "routed branches need the expert of every token"
            own = expert[:, None] == torch.arange(self.experts, device=expert.device)
            z = torch.where(own[..., None], z if z.dim() == 3 else z[:, None], 0).flatten(1)
        return pad(z, (0, padded_columns(z.shape[1]) - z.shape[1]))


def pack_up(factor: Factor, order: Order) -> Up:
    """A factor B [N, R] or [E, N, R], as in the checkpoint, to what the linear of a device with this order reads."""
    values, scale = padded_up(factor)
    bits = {torch.uint8: 4, torch.int8: 8}.get(values.dtype, 16)
    in_byte = 8 // min(bits, 8)
    rank = in_byte * values.shape[-1]
    experts = len(values) if values.dim() == 3 else None
    codes = values if experts is None else values.transpose(0, 1).flatten(1)
    codes = codes.view(torch.uint8) ^ 0x80 if bits == 8 else codes  # plus 2^(bits-1), as a checkpoint's words are
    columns = padded_columns(rank * (experts or 1))
    codes = pad(codes, (0, columns // in_byte - codes.shape[1]), value={4: 0x88, 8: 0x80, 16: 0}[bits]).contiguous()
    if scale is None:
        return codes
    if experts is None:
        return pack_weight(codes.view(torch.int32), bits, scale[:, None], columns, order)
    scales = pad(scale.t(), (0, columns // rank - experts))
    return pack_weight(codes.view(torch.int32), bits, scales, columns, order, group_size=rank)


class Argument(NamedTuple):
    """A `Branch` as the kernel takes it."""

    z: Tensor
    up: Tensor
    scale: Tensor | None
    columns: int
    """C."""
    z_columns: int
    """R, or E R."""
    experts: int | None
    BITS: tl.constexpr
    """16: not packed."""
    RANK: tl.constexpr
    """The rank of an expert; 0: shared."""
    COMPACT: tl.constexpr
    """Whether z holds the chosen expert's only."""


def argument(branch: Branch) -> Argument:
    z, up = branch.z, branch.up
    assert z.shape[-1] == padded_rank(z.shape[-1]), "the rank is not padded"
    assert (branch.experts or 0) <= MAX_EXPERTS, f"more than {MAX_EXPERTS} experts"
    compact = branch.experts is not None and z.dim() == 2
    if isinstance(up, Weight):
        values, scale, columns, bits = up.planes[0], up.scale, up.columns, up.bits
    else:
        values, scale, columns, bits = up, None, up.shape[1], 16
    return Argument(
        z,
        values,
        scale,
        columns,
        z.shape[1:].numel(),
        branch.experts,
        tl.constexpr(bits),
        tl.constexpr(0 if branch.experts is None else branch.rank),
        tl.constexpr(compact),
    )


@triton.constexpr_function
def _chunk(block_k: int, block_m: int, bits: int, rank: int) -> int:
    """Columns of a step: as many as leave room, in registers and shared memory, for as many programs as without
    branches. Each limit was found by ahead-of-time builds."""
    if block_m == 64 and rank > 0:
        return min(block_k, 32)
    return min(block_k, 64 if bits == 16 or block_m >= 64 else 128)


@triton.jit
def add_branch(acc, branch, chosen, row, rows, tokens, M, N, row_tiles, turn, WGMMA: tl.constexpr, BK: tl.constexpr,
               SPLIT_K: tl.constexpr):  # fmt: skip
    """(acc [BN, BM] + this part's share of up z^T, the turn for the next branch).

    Chunks of columns go to the parts in turn; `turn` counts this part's from the chunk that is next, so that no part
    gets the first chunk of every branch. Chunks before and behind those of the chosen experts are left out.
    """
    CHUNK: tl.constexpr = _chunk(BK, acc.shape[1], branch.BITS, branch.RANK)
    first = 0
    last = branch.columns // CHUNK
    needed = 1
    if branch.RANK > 0:
        needed = tl.reduce(tl.where(chosen < 0, 0, 1 << tl.maximum(chosen, 0)), 0, _union)
        first = tl.min(tl.where(chosen < 0, branch.experts, chosen), 0) * branch.RANK // CHUNK
        last = tl.maximum(tl.cdiv((tl.max(chosen, 0) + 1) * branch.RANK, CHUNK), first)
    for chunk in tl.range(first + turn, last, SPLIT_K):
        acc = _add_chunk(acc, branch, chosen, needed, chunk * CHUNK, row, rows, tokens, M, N, row_tiles, WGMMA, CHUNK)
    return acc, (turn + SPLIT_K - (last - first) % SPLIT_K) % SPLIT_K


@triton.jit
def _union(a, b):
    return a | b


@triton.jit
def _add_chunk(acc, branch, chosen, needed, column, row, rows, tokens, M, N, row_tiles, WGMMA: tl.constexpr,
               CHUNK: tl.constexpr):  # fmt: skip
    """acc + up z^T over the columns column .. column + CHUNK - 1."""
    BN: tl.constexpr = acc.shape[0]
    BM: tl.constexpr = acc.shape[1]
    RANK: tl.constexpr = branch.RANK
    dtype: tl.constexpr = tl.float32 if INTERPRET else branch.z.dtype.element_ty
    columns = column + tl.arange(0, CHUNK)
    own = (tokens < M)[None, :]
    place = columns
    if RANK > 0:
        own = chosen[None, :] == (columns // RANK)[:, None]
        if branch.COMPACT:
            place = columns % RANK
    else:
        own = own & (columns < branch.z_columns)[:, None]
    z = tl.load(branch.z + (tokens * branch.z_columns)[None, :] + place[:, None], mask=own, other=0)
    if branch.BITS == 16:
        mask = (rows < N)[:, None]
        if RANK > 0:  # nothing is read of an expert that no token here has
            mask = mask & ((needed >> (columns // RANK)) & 1 != 0)[None, :]
        up = tl.load(branch.up + (rows * branch.columns)[:, None] + columns[None, :], mask=mask, other=0)
        return dot(up.to(dtype), z, acc)
    else:
        w = load_weight(
            branch.up, branch.up, branch.up, row, column, row_tiles, branch.columns // 128,
            BN, CHUNK, branch.BITS, WGMMA, dtype,
        )  # fmt: skip
        if RANK > 0:
            span: tl.constexpr = min(RANK, CHUNK // 4)
            scales = load_scales(branch.scale, rows, column, N, branch.columns, RANK, span, CHUNK)
            return dot(scale_weights(_wide(w), scales).to(dtype), z, acc)
        else:
            by_row = tl.load(branch.scale + rows, mask=rows < N, other=0)
            if BM <= 64:
                return acc + dot(w, z, None) * by_row.to(tl.float32)[:, None]
            else:
                wide = _wide(w)
                return dot((wide * by_row.to(wide.dtype)[:, None]).to(dtype), z, acc)


@triton.jit
def _wide(w):
    """What is multiplied by scales: they may be too small for fp16."""
    return w.to(tl.float32) if w.dtype == tl.float16 else w
