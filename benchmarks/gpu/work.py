"""What one block costs, part by part: matrix products, bytes and calls, counted from its shapes.

    python benchmarks/gpu/work.py        the 72B block on an H100: writes benchmarks/results/block_predicted.json

A prediction, not a measurement (that is block.py's): work over rates. It has the recipes whose quantizer is gptq and
whose compensation is qera, the default `qe` among them; tests/benchmarks/test_block.py holds the products against those
that torch counts when the real code runs.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from qe_pipelines.results import write_result

from qe_dist.core.spec import BlockSpec, InputGroup, LinearSpec
from qe_dist.methods.base import SPREAD
from qe_dist.methods.compensation.qera import QERA
from qe_dist.methods.footprint import footprint
from qe_dist.methods.quantizers.gptq import FACTORS, GPTQ
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.recipes import load_recipe
from qe_dist.numerics.gram import PANEL
from qe_dist.numerics.lowrank import OVERSAMPLE, ROUGH, STEPS
from qe_dist.numerics.stats import M

RESULTS = Path(__file__).parent.parent / "results"
CALLS_OF_A_CHANNEL = 6
"""That GPTQ makes to settle one channel: two elementwise in place, two with a result, a difference, a product."""
CALLS_OF_A_STEP = 12
"""Of the subspace iteration."""


@dataclass(frozen=True)
class Shape:
    """One Qwen2 decoder block; the defaults are Qwen2-VL-72B's."""

    hidden: int = 8192
    intermediate: int = 29568
    heads: int = 64
    kv_heads: int = 8

    def block(self) -> BlockSpec:
        kv = self.hidden // self.heads * self.kv_heads
        groups = (
            _group("self_attn.qkv", self.hidden, {"q_proj": self.hidden, "k_proj": kv, "v_proj": kv}),
            _group("self_attn.o", self.hidden, {"o_proj": self.hidden}, "self_attn.qkv"),
            _group("mlp.gate_up", self.hidden, {"gate_proj": self.intermediate, "up_proj": self.intermediate}),
            _group("mlp.down", self.intermediate, {"down_proj": self.hidden}, "mlp.gate_up"),
        )
        return BlockSpec(0, "model.layers.0.", groups, ())


def _group(name: str, inputs: int, outputs: dict[str, int], router_input: str | None = None) -> InputGroup:
    parent = name.split(".")[0]
    linears = tuple(LinearSpec(f"{parent}.{n}", inputs, o, False, "column") for n, o in outputs.items())
    return InputGroup(name, linears, router_input or name)


@dataclass(frozen=True)
class Work:
    """flop: of products in the dtype of the activations, bf16 on a GPU. flop32: in float32. rough: in float32 that
    tensor cores may round (TF32). decomposed: of Cholesky, QR and eigenvectors."""

    flop: float = 0.0
    flop32: float = 0.0
    rough: float = 0.0
    decomposed: float = 0.0
    bytes: float = 0.0
    """Through memory, or for load and publish from and to the disk."""
    calls: float = 0.0
    """That a GPU waits for, where there are so many that they and not their work take the time."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Load:
    """What a block is given to do."""

    tokens: int = 262144
    batch: int = 8192
    """Tokens at a time."""
    length: int = 512
    """Of a sample."""
    sample: int = 4096
    itemsize: int = 2
    """Of an activation."""


def work(block: BlockSpec, recipe: Recipe, load: Load) -> dict[str, Work]:
    """By the names of the parts that block.py measures."""
    parts: dict[str, Callable[[InputGroup], Work]] = {
        "gram": lambda g: _gram(g.in_features, load),
        "channels": lambda g: Work(bytes=float(load.tokens * g.in_features * load.itemsize)),
        "round": lambda g: _gptq(sum(x.out_features for x in g.linears), g.in_features, recipe.quantizer),
        "share": lambda g: _gains(g, recipe),
        "repair": lambda g: _repair(g, recipe),
        "report": lambda g: Work(flop32=6.0 * load.sample * _weights(g)),
        "pack": lambda g: Work(bytes=_weights(g) * (1 + recipe.scheme.weight_bits / 8)),
    }
    if not (isinstance(recipe.quantizer, GPTQ) and isinstance(recipe.compensation, QERA)):
        parts = {n: part for n, part in parts.items() if n not in ("round", "share", "repair")}
    stored = block.num_weights * (recipe.scheme.weight_bits + (recipe.budget.extra_bits or 0.0)) / 8
    attention = 2.0 * load.tokens * load.length * block.group("self_attn.o").in_features
    return {
        "load": Work(bytes=2.0 * block.num_weights),
        "forward": Work(flop=2.0 * load.tokens * block.num_weights + attention),
        **{name: _sum(part(g) for g in block.groups) for name, part in parts.items()},
        "publish": Work(bytes=stored),
    }


def _sum(parts) -> Work:
    return sum(parts, Work())


def _weights(group: InputGroup) -> float:
    return float(sum(x.in_features * x.out_features for x in group.linears))


def _gram(width: int, load: Load) -> Work:
    panels = [(min(PANEL, width - low), width - low) for low in range(0, width, PANEL)]
    area = sum(prod(p) for p in panels)
    updates = M * -(-load.tokens // load.batch)  # each reads and writes the panels, and the mirrored half
    return Work(flop=2.0 * load.tokens * area, bytes=4.0 * updates * (2 * area + width * width))


def _gptq(outputs: int, width: int, gptq: GPTQ) -> Work:
    """Without the half of the products of a triangle that no algorithm saves: they are counted as they are made."""
    times = FACTORS if gptq.clip else 1
    return Work(
        flop32=float(times * outputs * width * (width - 1)),
        decomposed=width**3 / 3,
        bytes=4.0 * times * outputs * width * (width - 1).bit_length(),
        calls=float(CALLS_OF_A_CHANNEL * times * width),
    )


def _low_rank(outputs: int, width: int, rank: int) -> Work:
    r = min(rank, outputs, width)
    w = min(r + OVERSAMPLE, outputs, width)
    step = 4.0 * outputs * width * w + 2.0 * width * width * w
    rest = 2.0 * outputs * w * w + 2.0 * outputs * w * r + 2.0 * outputs * width * r
    return Work(
        flop32=(STEPS + 1 - ROUGH) * step + rest,
        rough=ROUGH * step,
        decomposed=STEPS * 4.0 * outputs * w * w + 9.0 * w**3,
        calls=float(STEPS * CALLS_OF_A_STEP),
    )


def rank_of(group: InputGroup, recipe: Recipe) -> int:
    """That a group gets if its block's budget is shared evenly; by how much they differ only the run knows."""
    outputs, width = sum(x.out_features for x in group.linears), group.in_features
    return recipe.budget.rank_for(outputs, width)


def _gains(group: InputGroup, recipe: Recipe) -> Work:
    if recipe.budget.extra_bits is None:
        return Work()
    outputs, width = sum(x.out_features for x in group.linears), group.in_features
    most = SPREAD * rank_of(group, recipe)
    return _low_rank(outputs, width, most) + Work(rough=2.0 * (outputs + min(most, outputs, width)) * width * width)


def _repair(group: InputGroup, recipe: Recipe) -> Work:
    outputs, width = sum(x.out_features for x in group.linears), group.in_features
    rank = rank_of(group, recipe)
    found = _low_rank(outputs, width, rank)
    if recipe.budget.factor_bits != 4:
        return found
    return found + Work(flop32=2.0 * rank * (width * width + rank * width + outputs * width))


@dataclass(frozen=True)
class Rates:
    """Of a machine, per second. Seen on an H100 that was lent (bf16 products of 8192, copies on the device), and
    assumed for what nobody has measured there yet."""

    flop: float = 7.98e14
    flop32: float = 4.5e13
    """Assumed: two thirds of the data sheet's 67 TFLOP/s."""
    rough: float = 3.5e14
    """Assumed: two thirds of the data sheet's 495 TFLOP/s."""
    decomposed: float = 1.5e13
    """Assumed."""
    bytes: float = 3.0e12
    disk: float = 2.0e9
    """Assumed: a checkpoint on a local disk or in the page cache."""
    calls: float = 2.0e5
    """Assumed: 5 us of Python and driver for each."""

    def floor(self, part: str, work: Work) -> float:
        """Products and bytes as if they were the only ones, whichever takes longer."""
        moved = work.bytes / (self.disk if part in ("load", "publish") else self.bytes)
        return max(self._products(work), moved)

    def _products(self, work: Work) -> float:
        return work.flop / self.flop + work.flop32 / self.flop32 + work.rough / self.rough

    def seconds(self, part: str, work: Work) -> float:
        moved = work.bytes / (self.disk if part in ("load", "publish") else self.bytes)
        return self._products(work) + work.decomposed / self.decomposed + moved + work.calls / self.calls


SIZES = {"72B": Shape(), "405B": Shape(hidden=16384, intermediate=53248, heads=128, kv_heads=8)}
DEVICES = (24e9, 80e9)
"""Bytes; an eighth is left for what is no tensor of ours."""


def memory_of(shape: Shape, recipe: Recipe, load: Load) -> dict[str, Any]:
    """Bytes of one block, and how many blocks fit into a device."""
    found = footprint(shape.block(), [recipe], load.sample, load.batch, load.itemsize)
    blocks = {f"{device / 1e9:.0f} GB": int((7 / 8 * device - found.passing) // found.kept) for device in DEVICES}
    return asdict(found) | {"peak": found.peak, "blocks": {n: max(0, count) for n, count in blocks.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="qe-w4a6")
    parser.add_argument("--tokens", type=int, default=Load().tokens)
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    given = parser.parse_args()
    shape, recipe = Shape(given.hidden, given.intermediate, given.heads, given.kv_heads), load_recipe(given.recipe)
    load, rates = Load(tokens=given.tokens), Rates()
    parts = work(shape.block(), recipe, load)
    table = {
        name: asdict(part) | {"floor": rates.floor(name, part), "seconds": rates.seconds(name, part)}
        for name, part in parts.items()
    }
    memory = {name: memory_of(size, recipe, load) for name, size in {"asked": shape, **SIZES}.items()}
    for name, row in table.items():
        print(f"{name:9}" + "".join(f"{key} {value:9.3g}  " for key, value in row.items()))
    total = {key: sum(row[key] for row in table.values()) for key in ("floor", "seconds")}
    print(f"all: floor {total['floor']:.2f} s, predicted {total['seconds']:.2f} s; {memory['asked']}")
    content = {"shape": asdict(shape), "load": asdict(load), "recipe": given.recipe, "rates": asdict(rates)}
    content |= {"parts": table, "total": total, "memory": memory}
    write_result(RESULTS / "block_predicted.json", content)


if __name__ == "__main__":
    sys.exit(main())
