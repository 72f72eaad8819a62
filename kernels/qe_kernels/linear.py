"""The quantized linear: one Triton kernel for 2- to 8-bit weights, 16- or 8-bit tensor cores, and every branch.

    y[M,N] = (base W^T) * token_scale * scale  +  sum over branches  z up^T  +  bias

* Operands are swapped: acc[N,M] = W[N,K] base^T[K,M]. The weights are the left operand, which tensor cores take from
  registers, where they are unpacked; and 16 tokens fill the narrow side of a tile instead of a quarter of the wide one.
* Weights stay exact integers up to the tensor core. Their scales are applied in one of three places (`_scaling`).
* K is split where the tiles alone would not fill the GPU; the reduction is deterministic (`split_k`). The chunks of the
  branches go round the parts, as more steps of K.
* Of routed experts only those are read that a token of the tile has chosen.

Letters: M tokens, K inputs, N outputs, G scale groups, R rank (or columns) of a branch, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qe_kernels.branches import Argument, Branch, add_branch, argument
from qe_kernels.launch import Launch
from qe_kernels.layout import Order, Weight, code_factor, unpack_weight
from qe_kernels.products import dot
from qe_kernels.scales import load_scales, scale_weights, scaled
from qe_kernels.split_k import Workspace, reduce_splits
from qe_kernels.triton_if_any import INTERPRET, tl, triton
from qe_kernels.unpack import load_weight


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
    """Parts of K, each a program's."""
    warps: int = 4
    stages: int = 4
    """Steps whose loads are in flight, plus one."""
    group_m: int = 8
    """Tiles of tokens that run side by side on the same weights, for the L2 cache."""
    scale_weights: bool = False
    """Group scales multiply the weights in registers, not the accumulators: cheaper from about 128 tokens on."""


class Linear:
    """A linear with its weight, branches and tiles: what is the same for every call with such inputs."""

    def __init__(self, weight: Weight, branches: Sequence[Branch], config: Config, out_dtype: torch.dtype) -> None:
        """branches: with any z of the right dtype and width."""
        self.weight, self.config, self.out_dtype = weight, config, out_dtype
        self.kept = [i for i, branch in enumerate(branches) if branch.rank]
        self.arguments = [argument(branches[i])[1:] for i in self.kept]
        self.sizes = (weight.rows, weight.columns, weight.row_tiles, weight.column_tiles)
        self.tiles_n = triton.cdiv(weight.rows, config.BN)
        constants = (
            len(self.kept), weight.bits, weight.order is Order.WGMMA, code_factor(weight.bits, weight.int8),
            weight.group_size, _scaling(weight, config), config.BN, config.BM, config.BK, config.split_k,
            config.group_m, weight.columns % config.BK == 0,
        )  # fmt: skip
        self.launch = Launch(_linear, constants, config.warps, config.stages)

    def __call__(
        self,
        base: Tensor,
        token_scale: Tensor | None,
        zs: Sequence[Tensor],
        expert: Tensor | None,
        bias: Tensor | None,
        workspace: Workspace,
    ) -> Tensor:
        """y [M, N]. Equal inputs give equal bits. Nothing is checked beyond what would write wrong memory."""
        tokens, config = base.shape[0], self.config
        y = base.new_empty((tokens, self.weight.rows), dtype=self.out_dtype)
        if tokens:
            tiles = self.tiles_n * -(-tokens // config.BM)
            workspace.check(tiles, config.split_k, config.BN * config.BM)
            given = self._given(base, token_scale, zs, expert, bias, y, workspace)
            self.launch((tiles * config.split_k, 1, 1), given)
        return y

    def compile(
        self, base: Tensor, token_scale: Tensor | None, zs: Sequence[Tensor], expert: Tensor | None,
        bias: Tensor | None, workspace: Workspace,
    ) -> None:  # fmt: skip
        """For inputs like these, of any number of tokens."""
        y = base.new_empty((1, self.weight.rows), dtype=self.out_dtype)
        self.launch.compile(self._given(base, token_scale, zs, expert, bias, y, workspace))

    def _given(
        self, base: Tensor, token_scale: Tensor | None, zs: Sequence[Tensor], expert: Tensor | None,
        bias: Tensor | None, y: Tensor, workspace: Workspace,
    ) -> tuple[Any, ...]:  # fmt: skip
        branches = tuple(Argument(zs[i], *rest) for i, rest in zip(self.kept, self.arguments, strict=True))
        return (
            base, token_scale, self.weight.three_planes, self.weight.scale, branches, expert, bias, y,
            workspace.partials, workspace.counters, base.shape[0], *self.sizes, base.stride(0),
        )  # fmt: skip


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
    """y [M, N] in `out_dtype`; arguments as `linear_reference` takes them, but on a GPU. `checks` checks them."""
    made = Linear(weight, branches, config, out_dtype)
    return made(base, token_scale, [branch.z for branch in branches], expert, bias, workspace)


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
        y = y + branch.z_side_by_side(expert, compute) @ branch.dense(compute).T
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(out_dtype)


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


# A serving engine meets every number of tokens, and the experts may be a row of several.
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["expert"])
def _linear(
    base, token_scale, planes, scale, branches, expert, bias, y, partials, counters,
    M, N, K, row_tiles, column_tiles, base_token,
    BRANCHES: tl.constexpr, BITS: tl.constexpr, WGMMA: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr,
    SCALING: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    # The parts of a tile are neighbours, so that tiles are finished all along, not all at the end.
    part = tl.program_id(0) % SPLIT_K
    tile = tl.program_id(0) // SPLIT_K
    tiles_n = tl.cdiv(N, BN)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tl.cdiv(M, BM), tiles_n, GROUP_M)
    rows = tile_n * BN + tl.arange(0, BN)
    tokens = tile_m * BM + tl.arange(0, BM)

    # Asked for before the loop, there after it; of many tokens they would take too many registers.
    if token_scale is not None and BM <= 64:
        by_token = tl.load(token_scale + tokens, mask=tokens < M, other=0.0)
    if SCALING == "output":
        by_row = tl.load(scale + rows, mask=rows < N, other=0)
    chosen = None
    if expert is not None:
        chosen = tl.load(expert + tokens, mask=tokens < M, other=-1)
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
    turn = part
    for i in tl.static_range(BRANCHES):
        acc, turn = add_branch(
            acc, branches[i], chosen, tile_n * BN, rows, tokens, M, N, row_tiles, turn, WGMMA, BK, SPLIT_K
        )

    sums = partials + tile.to(tl.int64) * (SPLIT_K * BN * BM)
    acc, is_last = reduce_splits(acc, sums, counters + tile, part, SPLIT_K)
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
            acc += dot(w, x, None).to(tl.float32) * now
        elif SCALING == "weight":
            w = scale_weights(w, load_scales(scale, rows, step * BK, N, K, GROUP, SPAN, BK))
            acc = dot(w, x, acc)
        else:
            acc = dot(w, x, acc)
    return acc.to(tl.float32)
