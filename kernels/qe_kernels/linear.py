"""The quantized linear: one Triton kernel for 2- to 8-bit weights, 16- or 8-bit tensor cores, and every branch.

    y[M,N] = (base W^T) * token_scale * scale  +  sum over branches  z up^T  +  bias

* Operands are swapped: acc[N,M] = W[N,K] base^T[K,M]. The weights are the left operand, which tensor cores take from
  registers, where they are unpacked; and 16 tokens fill the narrow side of a tile instead of a quarter of the wide one.
* Weights stay exact integers up to the tensor core. Their scales are applied in one of three places (`_scaling`).
* K is split where the tiles alone would not fill the GPU; the reduction is deterministic (`split_k`). The branches are
  then a part of their own, read beside the others and not after the last one.
* Of routed experts only those are read that a token of the tile has chosen.

Letters: M tokens, K inputs, N outputs, G scale groups, R rank (or columns) of a branch, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qe_kernels.factors import dense
from qe_kernels.layout import Order, Weight, code_factor, unpack_weight
from qe_kernels.products import finished
from qe_kernels.split_k import Workspace, reduce_splits
from qe_kernels.triton_if_any import INTERPRET, tl, triton
from qe_kernels.unpack import load_weight

MAX_EXPERTS = 32
"""Of a routed branch: a tile keeps the experts that it needs as bits of one integer."""


@dataclass(frozen=True)
class Branch:
    """z up^T beside the quantized product; routed where `up` has three dimensions.

    Rows of `z` and `up` that begin at multiples of 16 bytes are read fastest: ranks that are multiples of 32.
    """

    z: Tensor
    """[M, R]; of experts [M, E, R], or [M, R] where it holds the chosen expert's already. bf16 or fp16. Only what
    belongs to a token's own expert is read."""
    up: Tensor
    """[N, R] or [E, N, R]: bf16, fp16, int8; or uint8 [.., R/2], two codes + 8 to a byte, the even column below."""
    scale: Tensor | None = None
    """[N] or [E, N], of integers."""

    @property
    def experts(self) -> int | None:
        """None: shared by all tokens."""
        return self.up.shape[0] if self.up.dim() == 3 else None


@dataclass(frozen=True)
class Config:
    """How the kernel is cut. Which one is fastest, `dispatch` knows."""

    BN: int
    """Outputs of a tile."""
    BM: int
    """Tokens of a tile, at least 16."""
    BK: int
    """Inputs of a step."""
    split_k: int = 1
    """Parts of K, each a program's; where it is more than one, the branches are one more part."""
    warps: int = 4
    stages: int = 4
    """Steps whose loads are in flight, plus one."""
    group_m: int = 8
    """Tiles of tokens that run side by side on the same weights, for the L2 cache."""
    scale_weights: bool = False
    """Group scales multiply the weights in registers, not the accumulators: cheaper from about 128 tokens on."""


def linear(
    base: Tensor,
    token_scale: Tensor | None,
    weight: Weight,
    branches: Sequence[Branch] = (),
    expert: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    config: Config,
    workspace: Workspace,
) -> Tensor:
    """y [M, N] in `out_dtype`; arguments as `linear_reference` takes them, but on a GPU.

    Equal inputs give equal bits. Nothing is checked here beyond what would read wrong memory: `checks` does it.
    """
    tokens, columns = base.shape
    y = torch.empty(tokens, weight.rows, dtype=out_dtype, device=base.device)
    if not tokens:
        return y
    branches = tuple(_argument(branch) for branch in branches if branch.up.numel())
    parts = config.split_k + (config.split_k > 1 and len(branches) > 0)
    tiles = triton.cdiv(weight.rows, config.BN) * triton.cdiv(tokens, config.BM)
    workspace.check(tiles, parts, config.BN * config.BM)
    _linear[(tiles * parts,)](
        base, token_scale, weight.three_planes, weight.scale, branches, expert, bias, y,
        workspace.partials, workspace.counters,
        tokens, weight.rows, columns, weight.row_tiles, weight.column_tiles, base.stride(0),
        BRANCHES=len(branches), BITS=weight.bits, WGMMA=weight.order is Order.WGMMA,
        FACTOR=code_factor(weight.bits, weight.int8), GROUP=weight.group_size, SCALING=_scaling(weight, config),
        BN=config.BN, BM=config.BM, BK=config.BK, SPLIT_K=config.split_k, PARTS=parts,
        GROUP_M=config.group_m, EVEN_K=columns % config.BK == 0,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y


def linear_reference(
    base: Tensor,
    token_scale: Tensor | None,
    weight: Weight,
    branches: Sequence[Branch] = (),
    expert: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """The same in plain torch, in `compute` precision.

    base: [M, K] 16-bit floats (x~ itself, or codes of activations as floats), or int8 codes where `weight.int8`.
    token_scale: float32 [M] of activation codes. expert: int32 [M], the expert of every token, -1 for none.
    """
    codes, scale = unpack_weight(weight)
    y = base.to(compute) @ scaled(codes, scale, weight, compute).T
    if token_scale is not None:
        y = y * token_scale[:, None]
    for branch in branches:
        up, z = dense(branch.up, branch.scale, compute), branch.z.to(compute)
        if branch.experts is None:
            y = y + z @ up.T
        for i in range(branch.experts or 0):
            own = (expert == i)[:, None]
            y = y + torch.where(own, z[:, i] if z.dim() == 3 else z, 0) @ up[i].T
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(out_dtype)


def scaled(codes: Tensor, scale: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """codes [N, K], scale [N, G] -> weights [N, K]."""
    size = weight.group_size or weight.columns
    return codes.to(dtype) * scale.to(dtype).repeat_interleave(size, dim=1)[:, : weight.columns]


class _Branch(NamedTuple):
    """A `Branch` as the kernel takes it."""

    z: Tensor
    up: Tensor
    scale: Tensor | None
    rank: int
    experts: int | None
    z_token: int
    """Strides, in elements of the tensor as it is stored."""
    z_expert: int
    up_expert: int
    up_row: int
    BR: tl.constexpr
    """Columns of a step."""


def _argument(branch: Branch) -> _Branch:
    z, up, rank = branch.z, branch.up, branch.z.shape[-1]
    assert up.shape[-1] * (2 if up.dtype == torch.uint8 else 1) == rank, "z and up differ in rank"
    assert (branch.experts or 0) <= MAX_EXPERTS, f"more than {MAX_EXPERTS} experts"
    assert max(_extent(z), _extent(up)) < 2**31, "offsets of 32 bits save registers"
    return _Branch(
        z,
        up,
        branch.scale,
        rank,
        branch.experts,
        z.stride(0),
        z.stride(1) if z.dim() == 3 else 0,
        up.stride(0) if up.dim() == 3 else 0,
        up.stride(-2),
        tl.constexpr(min(64, max(16, triton.next_power_of_2(rank)))),
    )


def _extent(tensor: Tensor) -> int:
    """The largest offset of an element."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _scaling(weight: Weight, config: Config) -> str:
    """Where the scales of the weights are applied.

    output: one per channel, after the loop. accumulator: after each step, on partial sums of exact integers, which
    costs less than scaling weights while a tile has few tokens. weight: before the tensor core, rounded to 16 bits;
    the only way where a step holds more than one group.
    """
    if weight.group_size is None:
        return "output"
    if weight.group_size % config.BK == 0 and not config.scale_weights:
        return "accumulator"
    assert not weight.int8, "integer tensor cores cannot take scaled weights: a step must lie within one group"
    assert 0 in (config.BK % weight.group_size, weight.group_size % config.BK), "a step straddles groups"
    return "weight"


@triton.jit
def _linear(
    base, token_scale, planes, scale, branches, expert, bias, y, partials, counters,
    M, N, K, row_tiles, column_tiles, base_token,
    BRANCHES: tl.constexpr, BITS: tl.constexpr, WGMMA: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr,
    SCALING: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT_K: tl.constexpr,
    PARTS: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    # The parts of a tile are neighbours, so that tiles are finished all along, not all at the end.
    part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS
    tiles_n = tl.cdiv(N, BN)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tl.cdiv(M, BM), tiles_n, GROUP_M)
    rows = tile_n * BN + tl.arange(0, BN)
    tokens = tile_m * BM + tl.arange(0, BM)

    if PARTS == SPLIT_K or part < SPLIT_K:
        # Asked for before the loop, there after it; of many tokens they would take too many registers.
        if token_scale is not None and BM <= 64:
            by_token = tl.load(token_scale + tokens, mask=tokens < M, other=0.0)
        if SCALING == "output":
            by_row = tl.load(scale + rows, mask=rows < N, other=0)
        steps = tl.cdiv(K, BK)
        acc = _multiply(
            base, planes, scale, rows, tokens, tile_n * BN, steps * part // SPLIT_K, steps * (part + 1) // SPLIT_K,
            M, N, K, row_tiles, column_tiles, base_token, BITS, WGMMA, FACTOR, GROUP, SCALING, BN, BM, BK, EVEN_K,
        )  # fmt: skip
        if SCALING == "output":
            acc *= (by_row.to(tl.float32) * (1.0 / FACTOR))[:, None]
        if token_scale is not None and BM > 64:
            by_token = tl.load(token_scale + tokens, mask=tokens < M, other=0.0)
        if token_scale is not None:
            acc *= by_token[None, :]
    else:
        acc = tl.zeros([BN, BM], tl.float32)
    if PARTS == 1 or part == SPLIT_K:
        chosen = None
        if expert is not None:
            chosen = tl.load(expert + tokens, mask=tokens < M, other=-1)
        for i in tl.static_range(BRANCHES):
            acc = _add_branch(acc, branches[i], chosen, rows, tokens, M, N)

    sums = partials + tile.to(tl.int64) * (PARTS * BN * BM)
    acc, is_last = reduce_splits(acc, sums, counters + tile, part, PARTS)
    if is_last:
        if bias is not None:
            acc += tl.load(bias + rows, mask=rows < N, other=0).to(tl.float32)[:, None]
        place = y + tokens.to(tl.int64)[None, :] * N + rows[:, None]
        tl.store(place, acc.to(y.dtype.element_ty), mask=(tokens < M)[None, :] & (rows < N)[:, None])


@triton.jit
def _multiply(
    base, planes, scale, rows, tokens, row, first, last, M, N, K, row_tiles, column_tiles, base_token,
    BITS: tl.constexpr, WGMMA: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr, SCALING: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BM]: W base^T over the steps first .. last - 1, with W's scales unless SCALING is output."""
    dtype: tl.constexpr = base.dtype.element_ty
    integers: tl.constexpr = dtype == tl.int8 and SCALING == "output"
    SPAN: tl.constexpr = min(GROUP or BK, BK // 4 if BN <= 128 else BK // 2)
    columns = tl.arange(0, BK)
    inputs = base + tokens.to(tl.int64)[None, :] * base_token + columns[:, None]
    acc = tl.zeros([BN, BM], tl.int32 if integers else tl.float32)
    if SCALING == "accumulator":
        # Triton pipelines only what feeds the tensor core, so the scales of the next step are fetched here; as they
        # are stored, because a conversion would wait for them.
        coming = load_scales(scale, rows, first * BK, N, K, GROUP, BK, BK)
    for step in tl.range(first, last):
        mask = (tokens < M)[None, :]
        if not EVEN_K:
            mask = mask & (columns < K - step * BK)[:, None]
        x = tl.load(inputs + step * BK, mask=mask, other=0, eviction_policy="evict_last")
        w = load_weight(
            planes[0], planes[1], planes[2], row, step * BK, row_tiles, column_tiles,
            BN, BK, BITS, WGMMA, tl.float32 if INTERPRET and dtype != tl.int8 else dtype,
        )  # fmt: skip
        if SCALING == "accumulator":
            now = coming.to(tl.float32) * (1.0 / FACTOR)
            coming = load_scales(scale, rows, tl.minimum(step + 1, last - 1) * BK, N, K, GROUP, BK, BK)
            acc += _dot(w, x, None).to(tl.float32) * now
        elif SCALING == "weight":
            w = scale_weights(w, load_scales(scale, rows, step * BK, N, K, GROUP, SPAN, BK))
            acc = _dot(w, x, acc)
        else:
            acc = _dot(w, x, acc)
    return acc.to(tl.float32)


@triton.jit
def load_scales(scale, rows, k, N, K, GROUP: tl.constexpr, SPAN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK / SPAN]: the scales of each SPAN of the columns k .. k + BK - 1; a span lies within a group.

    Spans that share a group are worth it where a thread then loads 4 bytes, the least that is copied asynchronously.
    """
    columns = k + SPAN * tl.arange(0, BK // SPAN)
    mask = (rows < N)[:, None]
    if BK > SPAN:
        mask = mask & (columns < K)[None, :]
    return tl.load(scale + (columns // GROUP).to(tl.int64)[None, :] * N + rows[:, None], mask=mask, other=0)


@triton.jit
def scale_weights(w, scales):
    """w [BN, BK] by scales [BN, groups]."""
    BN: tl.constexpr = w.shape[0]
    GROUPS: tl.constexpr = scales.shape[1]
    grouped = w.reshape(BN, GROUPS, w.shape[1] // GROUPS)
    return (grouped * scales.to(w.dtype)[:, :, None]).reshape(BN, w.shape[1])


@triton.jit
def _add_branch(acc, branch, chosen, rows, tokens, M, N):
    """acc [BN, BM] + up z^T, by chunks of the ranks, of experts one after the other."""
    BM: tl.constexpr = acc.shape[1]
    chunks = tl.cdiv(branch.rank, branch.BR)
    if branch.experts is None:
        by_row = None
        if branch.scale is not None:
            by_row = tl.load(branch.scale + rows, mask=rows < N, other=0)
        for chunk in tl.range(0, chunks):
            acc = _add_chunk(acc, branch, by_row, 0, chunk, rows, tokens, tokens < M, N)
    else:
        needed = tl.reduce(tl.where(chosen < 0, 0, 1 << tl.maximum(chosen, 0)), 0, _union)
        for i in tl.range(0, branch.experts * chunks):
            e = i // chunks
            # A large tile needs nearly all of them, and a loop without a branch is pipelined.
            if BM >= 128 or (needed >> e) & 1 != 0:
                by_row = None
                if branch.scale is not None:
                    by_row = tl.load(branch.scale + e * N + rows, mask=rows < N, other=0)
                acc = _add_chunk(acc, branch, by_row, e, i % chunks, rows, tokens, chosen == e, N)
    return acc


@triton.jit
def _union(a, b):
    return a | b


@triton.jit
def _add_chunk(acc, branch, by_row, e, chunk, rows, tokens, own, N):
    """acc + by_row up[e] z[:, e]^T over a chunk of the ranks; z is read where `own` is true, and 0 elsewhere."""
    BR: tl.constexpr = branch.BR
    # A thread's share of a load is chosen for all loads of a shape. Bytes are read by 8 and not by 16, for 16 elements
    # of a plane of weights would be 32 bytes: two loads that use half of every sector.
    ranks = chunk * BR + tl.max_contiguous(tl.arange(0, BR), 8)
    z_rows = branch.z + e * branch.z_expert + tokens * branch.z_token
    z = tl.load(z_rows[None, :] + ranks[:, None], mask=own[None, :] & (ranks < branch.rank)[:, None], other=0)
    up_rows = branch.up + e * branch.up_expert + rows * branch.up_row
    if branch.up.dtype.element_ty == tl.uint8:
        pairs = chunk * (BR // 2) + tl.max_contiguous(tl.arange(0, BR // 2), 8)
        mask = (rows < N)[:, None] & (pairs < branch.rank // 2)[None, :]
        codes = tl.load(up_rows[:, None] + pairs[None, :], mask=mask, other=0)
        up = tl.join(codes & 15, codes >> 4).reshape(acc.shape[0], BR).to(tl.int8) - 8
    else:
        mask = (rows < N)[:, None] & (ranks < branch.rank)[None, :]
        up = tl.load(up_rows[:, None] + ranks[None, :], mask=mask, other=0)
    if by_row is not None:
        up = up.to(tl.float32) * by_row.to(tl.float32)[:, None]
    return _dot(up.to(tl.float32 if INTERPRET else z.dtype), z, acc)


@triton.jit
def _dot(a, b, acc):
    """a b + acc (None: 0). The interpreter would take bf16 for integers."""
    if INTERPRET and b.dtype != tl.int8:
        b = b.to(tl.float32)
    return finished(tl.dot(a, b, acc, out_dtype=tl.int32 if b.dtype == tl.int8 else tl.float32))
