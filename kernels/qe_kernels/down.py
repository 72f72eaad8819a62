"""The prologue of a quantized linear: low-rank down projections and routing, in one launch and one read of x.

    shared_z = x A_s^T        expert_z[e] = x A_e^T        expert = argmin_e (router |x|)_e

A is the tensor core's left operand and x^T its right one, for A has many rows and x often few: 16 tokens fill a tile.
A program owns a tile of rows of one matrix, a tile of tokens and a part of K (`split_k`). The factors are read as they
lie in the checkpoint, each byte once: 4-bit pairs are unpacked in registers. Row tiles vary fastest, so programs that
run together read the same x, from the L2 cache but for the first.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qe_kernels.factors import Factor, dense
from qe_kernels.launch import Launch
from qe_kernels.products import finished
from qe_kernels.split_k import Workspace, reduce_splits
from qe_kernels.triton_if_any import INTERPRET, tl, triton


@dataclass(frozen=True)
class Down:
    """What the linears of a group share beside their quantized input."""

    shared_z: Tensor | None
    """[M, R], x's dtype."""
    expert_z: Tensor | None
    """[M, E, R], x's dtype. Where `expert` was given, only the token's own expert is sure to be written."""
    expert: Tensor | None
    """int32 [T, M], the choices of T routers: ties go to the lower index, scores that are NaN are never chosen, and a
    token that has no other is without expert (-1)."""


@dataclass(frozen=True)
class DownConfig:
    """A program's tile (rows of A, tokens, columns at a time), the programs that share its K, warps and stages."""

    rows: int
    tokens: int
    columns: int
    split_k: int
    warps: int
    stages: int


_BY_TOKENS = (
    (16, DownConfig(rows=64, tokens=16, columns=128, split_k=32, warps=4, stages=4)),
    (256, DownConfig(rows=64, tokens=64, columns=128, split_k=16, warps=4, stages=3)),
    (None, DownConfig(rows=128, tokens=128, columns=64, split_k=8, warps=8, stages=3)),
)
"""Up to so many tokens, the tile, with the most splits that pay: the last program reads the partial sums of all."""


def down_config(tokens: int, rows: int, columns: int, processors: int) -> DownConfig:
    """K is split until each of the GPU's `processors` has two programs, into a power of two. Estimated, not yet timed.

    rows: of all factors together, or of all routers where there is no factor.
    """
    tile = next(tile for most, tile in _BY_TOKENS if most is None or tokens <= most)
    tiles = triton.cdiv(max(rows, 1), tile.rows) * triton.cdiv(max(tokens, 1), tile.tokens)
    deepest = triton.cdiv(columns, tile.columns) // 4  # shorter loops never fill the pipeline
    split = max(1, min(tile.split_k, deepest, 2 * processors // tiles))
    return replace(tile, split_k=1 << split.bit_length() - 1)


class Projection:
    """A prologue with its factors, routers and tiles: what is the same for every call with such inputs."""

    def __init__(
        self, shared: Factor | None, experts: Factor | None, router: Tensor | None, columns: int, config: DownConfig
    ) -> None:
        """columns: of x. ValueError where the shared factor and the experts' are not stored alike."""
        self.shared, self.experts, self.router, self.config = shared, experts, router, config
        if shared is not None and experts is not None and shared[0].dtype != experts[0].dtype:
            raise ValueError(f"experts: expected {shared[0].dtype} as shared, found {experts[0].dtype}")
        self.shared_rows = 0 if shared is None else len(shared[0])
        self.num_experts: int
        self.rank: int
        self.num_experts, self.rank = (0, 1) if experts is None else experts[0].shape[:2]
        self.routers, choices, router_columns = (0, 0, 0) if router is None else router.shape
        expert_rows = self.num_experts * self.rank
        padded_choices = max(16, triton.next_power_of_2(choices))
        self.row_tiles = (
            triton.cdiv(self.shared_rows, config.rows) + triton.cdiv(expert_rows, config.rows) + self.routers
        )
        self.tile_size = max(config.rows, padded_choices) * config.tokens
        stored = next((factor[0].shape[-1] for factor in (shared, experts) if factor is not None), 0)
        self.sizes = (columns, stored)
        self.of_shared = (*(shared or (None, None)), self.shared_rows)
        self.of_experts = (*(experts or (None, None)), expert_rows)
        self.of_router = (router, router_columns, choices)
        constants = (config.rows, config.tokens, config.columns, padded_choices, self.tile_size, config.split_k)
        self.launch = Launch(_down, constants, config.warps, config.stages)

    def __call__(self, x: Tensor, router_x: Tensor | None, expert: Tensor | None, workspace: Workspace) -> Down:
        """See `down`. ValueError where the workspace is too small."""
        tokens, config = x.shape[0], self.config
        result = self._empty(x)
        token_tiles = -(-tokens // config.tokens)
        workspace.check(self.row_tiles * token_tiles, config.split_k, self.tile_size)
        if self.row_tiles * token_tiles:
            given = self._given(x, router_x, expert, workspace, result)
            self.launch((self.row_tiles, token_tiles, config.split_k), given)
        return result

    def compile(self, x: Tensor, router_x: Tensor | None, expert: Tensor | None, workspace: Workspace) -> None:
        """For inputs like these, of any number of tokens."""
        self.launch.compile(self._given(x, router_x, expert, workspace, self._empty(x)))

    def _empty(self, x: Tensor) -> Down:
        tokens = x.shape[0]
        return Down(
            None if self.shared is None else x.new_empty((tokens, self.shared_rows)),
            None if self.experts is None else x.new_empty((tokens, self.num_experts, self.rank)),
            None if self.router is None else x.new_empty((self.routers, tokens), dtype=torch.int32),
        )

    def _given(
        self, x: Tensor, router_x: Tensor | None, expert: Tensor | None, workspace: Workspace, result: Down
    ) -> tuple[Any, ...]:
        return (
            x, x.stride(0), x.shape[0], *self.sizes, *self.of_shared, result.shared_z, *self.of_experts,
            result.expert_z, self.rank, expert, *self.of_router, router_x,
            0 if router_x is None else router_x.stride(0), result.expert, workspace.partials, workspace.counters,
        )  # fmt: skip


def down(
    x: Tensor,
    shared: Factor | None = None,
    experts: Factor | None = None,
    router: Tensor | None = None,
    router_x: Tensor | None = None,
    expert: Tensor | None = None,
    *,
    config: DownConfig,
    workspace: Workspace,
) -> Down:
    """Down projections of x [M, K] (bf16 or fp16), and the experts that routers choose.

    shared: [R, K]; experts: [E, R, K]; router: [T, E, H], T routers that all read router_x [M, H]. Contiguous, but for
    the rows of x and router_x, which may lie apart. expert: int32 [M], the tokens' experts where they are known (-1:
    none); the factors of experts that no token of a tile has are then not read. ValueError where the shared factor and
    the experts' are not stored alike, or the workspace is too small; the shapes are not checked.
    """
    return Projection(shared, experts, router, x.shape[1], config)(x, router_x, expert, workspace)


def down_reference(
    x: Tensor,
    shared: Factor | None = None,
    experts: Factor | None = None,
    router: Tensor | None = None,
    router_x: Tensor | None = None,
    expert: Tensor | None = None,
) -> Down:
    """`down` in plain torch, summed in float32, or float64 where x is; every expert's z is written."""
    wide = torch.promote_types(x.dtype, torch.float32)
    chosen = None
    if router is not None:
        assert router_x is not None, "a router needs what it reads"
        scores = torch.einsum("teh,mh->tme", router.to(wide), router_x.to(wide).abs())
        best = torch.where(scores.isnan(), torch.inf, scores).amin(dim=-1, keepdim=True)
        none = router.shape[1]
        index = torch.where(scores == best, torch.arange(none, device=x.device), none).amin(dim=-1)
        chosen = torch.where(index < none, index, -1).to(torch.int32)
    return Down(
        None if shared is None else (x.to(wide) @ dense(*shared, wide).T).to(x.dtype),
        None if experts is None else torch.einsum("mk,erk->mer", x.to(wide), dense(*experts, wide)).to(x.dtype),
        chosen,
    )


# A serving engine meets every number of tokens, and the experts may be a row of several.
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["expert"])
def _down(
    x,
    x_stride,
    tokens,
    columns,
    stored,
    shared,
    shared_scale,
    shared_rows,
    shared_z,
    experts,
    expert_scale,
    expert_rows,
    expert_z,
    rank,
    expert,
    router,
    router_columns,
    choices,
    router_x,
    router_stride,
    chosen,
    partials,
    counters,
    BR: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Grid: (row tiles of shared, row tiles of experts, routers) x token tiles x SPLIT_K."""
    tile, split = tl.program_id(0), tl.program_id(2)
    output = tl.program_id(1) * tl.num_programs(0) + tile
    partials += output.to(tl.int64) * (SPLIT_K * TILE)
    counter = counters + output
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    has_token = token < tokens
    shared_tiles = tl.cdiv(shared_rows, BR)
    factor_tiles = shared_tiles + tl.cdiv(expert_rows, BR)
    wide = token.to(tl.int64)  # tokens x columns may pass 2^31

    if (shared is not None or experts is not None) and tile < factor_tiles:
        is_shared = tile < shared_tiles
        row = (tile - tl.where(is_shared, 0, shared_tiles)) * BR + tl.arange(0, BR)
        rows = tl.where(is_shared, shared_rows, expert_rows)
        has_row = row < rows
        if experts is not None and expert is not None and tile >= shared_tiles:
            own = tl.load(expert + token, mask=has_token, other=-1)
            has_row &= tl.max(((row // rank)[:, None] == own[None, :]).to(tl.int32), axis=1) > 0
        if tl.max(has_row.to(tl.int32), axis=0) > 0:
            values = _either(is_shared, shared, experts) + row.to(tl.int64) * stored
            acc = _product(values, has_row, x + wide * x_stride, has_token, columns, split, BK, SPLIT_K)
            acc, last = reduce_splits(acc, partials, counter, split, SPLIT_K)
            if last:
                if shared_scale is not None or expert_scale is not None:  # Triton 3.6 returns no None
                    scale = _either(is_shared, shared_scale, expert_scale)
                    acc *= tl.load(scale + row, mask=has_row, other=0).to(tl.float32)[:, None]
                z = _either(is_shared, shared_z, expert_z) + wide * rows
                tl.store(z[None, :] + row[:, None], acc, mask=has_row[:, None] & has_token[None, :])
    if router is not None and tile >= factor_tiles:
        index = tile - factor_tiles
        choice = tl.arange(0, BE)
        has_choice = choice < choices
        values = router + (index * choices + choice).to(tl.int64) * router_columns
        inputs = router_x + wide * router_stride
        scores = _product(values, has_choice, inputs, has_token, router_columns, split, BK, SPLIT_K, MAGNITUDE=True)
        scores, last = reduce_splits(scores, partials, counter, split, SPLIT_K)
        if last:
            tl.store(chosen + index * tokens + token, _lowest(scores, choice, has_choice), mask=has_token)


@triton.jit
def _either(condition, one, other):
    """One where the condition holds, or where there is no other."""
    if one is None:
        return other
    elif other is None:
        return one
    else:
        return tl.where(condition, one, other)


@triton.jit
def _product(
    values,
    has_row,
    x,
    has_token,
    columns,
    split,
    BK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    MAGNITUDE: tl.constexpr = False,
):
    """values x^T, or values |x|^T, over this split's part of the columns: float32 [rows, tokens].

    values [rows], x [tokens]: pointers to where the rows begin.
    """
    PAIRS: tl.constexpr = values.dtype.element_ty == tl.uint8
    PER_VALUE: tl.constexpr = 2 if PAIRS else 1
    part = tl.cdiv(tl.cdiv(columns, BK), SPLIT_K) * BK
    k = tl.arange(0, BK)
    stored = tl.arange(0, BK // PER_VALUE)
    acc = tl.zeros([values.shape[0], x.shape[0]], tl.float32)
    for first in range(split * part, min(split * part + part, columns), BK):
        has_stored = first // PER_VALUE + stored < columns // PER_VALUE
        a = tl.load(
            values[:, None] + (first // PER_VALUE + stored)[None, :],
            mask=has_row[:, None] & has_stored[None, :],
            other=0,
        )
        b = tl.load(
            x[None, :] + (first + k)[:, None], mask=(first + k < columns)[:, None] & has_token[None, :], other=0
        )
        if PAIRS:
            a = _unpack(a, b.dtype)
        elif a.dtype == tl.int8:
            a = a.to(tl.float32 if INTERPRET else b.dtype)
        if MAGNITUDE:
            b = tl.abs(b.to(tl.float32)).to(b.dtype)
        acc = _dot(a, b, acc)
    return acc


@triton.jit
def _unpack(pairs, DTYPE: tl.constexpr):
    """[rows, n] bytes with two codes + 8 -> the codes [rows, 2 n], exactly.

    A code + 8 becomes the lowest bits of a float whose last bit counts 1: cheaper than a conversion from integers.
    """
    codes = tl.join(pairs & 15, pairs >> 4).reshape(pairs.shape[0], 2 * pairs.shape[1])
    if INTERPRET:
        return codes.to(tl.float32) - 8
    elif DTYPE.is_bf16():
        return (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - (128 + 8)
    else:
        return (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024 + 8)


@triton.jit
def _dot(a, b, acc):
    """acc + a b with exact products; where 16-bit types differ, in float32."""
    if INTERPRET or a.dtype != b.dtype:
        return finished(tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3"))
    else:
        return finished(tl.dot(a, b, acc))


@triton.jit
def _lowest(scores, choice, has_choice):
    """The choice with the lowest of scores [choices, tokens]; -1 where all are NaN."""
    NONE: tl.constexpr = choice.shape[0]
    known = has_choice[:, None] & (scores == scores)
    best = tl.min(tl.where(known, scores, float("inf")), axis=0)
    lowest = tl.min(tl.where(known & (scores == best[None, :]), choice[:, None], NONE), axis=0)
    return tl.where(lowest < NONE, lowest, -1)
