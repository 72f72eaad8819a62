"""Random linears of real shapes, as a checkpoint would hold them: for bench_kernels.py and tune.py."""

from dataclasses import dataclass, replace

import torch
from qe_kernels import Branch, Weight, order_for, pack_up, pack_weight, padded_down
from qe_kernels.branches import Up
from qe_kernels.factors import Factor
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """Of weights and activations, and which tensor cores multiply them."""

    name: str
    bits: int
    group_size: int | None = None
    act_bits: int | None = None
    outliers: int = 0
    int8: bool = False


FORMATS = {
    f.name: f
    for f in (
        Format("w4a16g128", 4, group_size=128),
        Format("w4a6k64", 4, act_bits=6, outliers=64),
        Format("w4a8", 4, act_bits=8, int8=True),
    )
}


@dataclass(frozen=True)
class Repair:
    """Ranks of the low-rank branches, and bits of their factors."""

    name: str
    shared: int = 0
    experts: int = 0
    rank: int = 0
    """Of an expert."""
    bits: int = 16


REPAIRS = {r.name: r for r in (Repair("bare"), Repair("shared", 384, bits=4), Repair("experts", 32, 8, 16, bits=8))}


@dataclass(frozen=True)
class Layer:
    name: str
    outputs: int
    inputs: int


def layers(hidden: int, intermediate: int, heads: int, kv_heads: int) -> tuple[Layer, ...]:
    """The fused linears of a decoder block."""
    kv = hidden // heads * kv_heads
    return (
        Layer("qkv", hidden + 2 * kv, hidden),
        Layer("o", hidden, hidden),
        Layer("gate_up", 2 * intermediate, hidden),
        Layer("down", hidden, intermediate),
    )


MODELS = {"72B": layers(8192, 29568, 64, 8), "7B": layers(3584, 18944, 28, 4)}


@dataclass(frozen=True)
class Problem:
    """A quantized linear with its branches."""

    format: Format
    weight: Weight
    shared_down: Factor | None = None  # [R, K]
    shared_up: Up | None = None  # [N, R]
    expert_down: Factor | None = None  # [E, R, K]
    expert_up: Up | None = None  # [E, N, R]
    router: Tensor | None = None
    """[1, E, K]"""
    bias: Tensor | None = None

    def branches(self, shared_z: Tensor | None, expert_z: Tensor | None) -> list[Branch]:
        experts = None if self.expert_down is None else len(self.expert_down[0])
        given = ((shared_z, self.shared_up, None), (expert_z, self.expert_up, experts))
        return [Branch(z, up, count) for z, up, count in given if z is not None and up is not None]


class Random:
    """Tensors that depend on the seed and on how many came before."""

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def tokens(self, count: int, width: int) -> Tensor:
        """A few channels are loud, as in trained models."""
        loud = torch.ones(width, device=self.device, dtype=self.dtype)
        loud[:: max(1, width // 32)] = 8.0
        return self.normal(count, width) * loud

    def words(self, rows: int, columns: int, bits: int) -> Tensor:
        """A matrix of random codes in checkpoint order: any bits are codes."""
        return self.integers(-(2**31), 2**31, rows, -(-columns * bits // 32), dtype=torch.int32)

    def factor(self, bits: int, *shape: int) -> Factor:
        """A matrix of the size of an orthogonal one, as it is stored."""
        size = shape[-1] ** -0.5
        if bits == 16:
            return self.normal(*shape) * size, None
        *rows, columns = shape
        scale = (0.5 + torch.rand(rows, generator=self.generator, device=self.device)) * size * 2 ** (2 - bits)
        if bits == 8:
            return self.integers(-127, 128, *shape, dtype=torch.int8), scale.to(self.dtype)
        return self.integers(0, 256, *rows, columns // 2, dtype=torch.uint8), scale.to(self.dtype)

    def problem(self, layer: Layer, format: Format) -> Problem:
        """Without branches."""
        outputs, inputs = layer.outputs, layer.inputs
        groups = inputs // format.group_size if format.group_size else 1
        size = inputs**-0.5 * 2.0 ** (2 - format.bits)
        scale = (0.5 + torch.rand(outputs, groups, generator=self.generator, device=self.device)) * size
        words, order = self.words(outputs, inputs, format.bits), order_for(self.device)
        scale = scale.to(self.dtype)
        return Problem(
            format, pack_weight(words, format.bits, scale, inputs, order, format.int8, format.group_size, in_place=True)
        )

    def repaired(self, bare: Problem, repair: Repair) -> Problem:
        """The same weight with branches."""
        outputs, inputs, bits, problem = bare.weight.rows, bare.weight.columns, repair.bits, bare
        if repair.shared:
            down, up = self.factor(bits, repair.shared, inputs), self.factor(bits, outputs, repair.shared)
            problem = replace(problem, shared_down=padded_down(down), shared_up=pack_up(up, order_for(self.device)))
        if repair.experts:
            problem = replace(
                problem,
                expert_down=padded_down(self.factor(bits, repair.experts, repair.rank, inputs)),
                expert_up=pack_up(self.factor(bits, repair.experts, outputs, repair.rank), order_for(self.device)),
                router=self.normal(1, repair.experts, inputs, dtype=torch.float32),
            )
        return problem


def some_rows(problem: Problem, tiles: int = 4) -> tuple[list[int], Problem]:
    """The problem of a few tiles of 64 outputs, the last one among them, and which outputs these are."""
    weight = problem.weight
    chosen = sorted({*range(tiles - 1), weight.row_tiles - 1} & set(range(weight.row_tiles)))
    rows = [r for tile in chosen for r in range(64 * tile, min(64 * tile + 64, weight.rows))]
    return rows, replace(
        problem,
        weight=_of_tiles(weight, chosen, rows),
        shared_up=_of_rows(problem.shared_up, chosen, rows),
        expert_up=_of_rows(problem.expert_up, chosen, rows),
        bias=None if problem.bias is None else problem.bias[rows],
    )


def _of_tiles(weight: Weight, tiles: list[int], rows: list[int]) -> Weight:
    planes = tuple(plane[tiles] for plane in weight.planes)
    return replace(weight, planes=planes, scale=weight.scale[:, rows].contiguous(), rows=len(rows))


def _of_rows(up: Up | None, tiles: list[int], rows: list[int]) -> Up | None:
    return _of_tiles(up, tiles, rows) if isinstance(up, Weight) else None if up is None else up[rows].contiguous()
