"""Which kernel with which tiles: by device, shape, kind of arithmetic and number of tokens.

Measured choices lie in tables/, one JSON file for each device, written by benchmarks/gpu/tune.py:

    {"device": "NVIDIA H100 80GB HBM3",            as torch.cuda.get_device_name() says it
     "environment": {...},                         date, command and versions of the measurement
     "linears": {
       "w4a16g128 10240x8192": {                   kind (see `kind_of`), outputs x inputs
         "16": {"BN": 64, "BM": 16, ...},          bucket of tokens: the fields of `linear.Config`
         "4096": null}}}                           null: dequantize once and let cuBLAS multiply

A bucket serves the numbers of tokens that are at most as large and larger than the bucket before; the last one also
all above it. Where a table has no answer, `heuristic` gives one. Nothing is tuned at run time: that would break the
capture of CUDA graphs, and ranks that work together could choose differently.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import torch

from qe_kernels.down import DownConfig, down_config
from qe_kernels.layout import Order, Weight, field_widths
from qe_kernels.linear import Config

BUCKETS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0))
"""Ampere, Ada and Hopper: what the kernels are compiled for."""

Table = Mapping[str, Mapping[int, Config | None]]
"""The configuration for each `key_of` and bucket; None: dequantize once and let cuBLAS multiply."""


@dataclass(frozen=True)
class Device:
    """A GPU that the kernels run on."""

    name: str
    capability: tuple[int, int]
    processors: int
    """Streaming multiprocessors."""


@cache
def device_of(device: torch.device) -> Device | None:
    """None for a CPU, for a GPU that the kernels are not made for, and where Triton is not installed."""
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return None
    found = torch.cuda.get_device_properties(device)
    capability = (found.major, found.minor)
    return Device(found.name, capability, found.multi_processor_count) if capability in CAPABILITIES else None


def kind_of(weight: Weight) -> str:
    """Bits of the weights, of the tensor cores (16 or 8), and the group size: `w4a16g128`, `w4a8`."""
    group = f"g{weight.group_size}" if weight.group_size else ""
    return f"w{weight.bits}a{8 if weight.int8 else 16}{group}"


def key_of(weight: Weight) -> str:
    return f"{kind_of(weight)} {weight.rows}x{weight.columns}"


def bucket_of(tokens: int) -> int:
    """The smallest bucket that holds so many, or the largest of all."""
    return BUCKETS[min(bisect_left(BUCKETS, tokens), len(BUCKETS) - 1)]


def place_of(tokens: int) -> int:
    """The index of the bucket of so many tokens; behind the last one for more than it holds."""
    return bisect_left(BUCKETS, tokens)


def bucket_config(tokens: int, rows: int, columns: int, processors: int) -> DownConfig:
    """See `down_config`: the same for all tokens of a bucket. Above the largest, tiles alone fill a GPU."""
    config = down_config(bucket_of(tokens), rows, columns, processors)
    return replace(config, split_k=1) if tokens > BUCKETS[-1] else config


def choose(device: Device, weight: Weight, tokens: int) -> Config | None:
    """The tiles of the fused kernel, or None where dequantizing once and cuBLAS is expected to be faster."""
    measured = table_of(device.name).get(key_of(weight), {})
    bucket = bucket_of(tokens)
    return measured[bucket] if bucket in measured else heuristic(device, weight, tokens)


@cache
def table_of(name: str) -> Table:
    """What was measured on the device of this name; empty where nothing was."""
    path = files("qe_kernels").joinpath("tables", file_name(name))
    return read_table(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def file_name(device: str) -> str:
    """The name of the table of a device: `nvidia-h100-80gb-hbm3.json`."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def read_table(content: Mapping[str, Any]) -> Table:
    return {
        key: {int(bucket): None if config is None else Config(**config) for bucket, config in row.items()}
        for key, row in content["linears"].items()
    }


def written_table(table: Table) -> dict[str, Any]:
    """The part `linears` of the file."""
    return {
        key: {str(bucket): None if config is None else asdict(config) for bucket, config in sorted(row.items())}
        for key, row in sorted(table.items())
    }


DENSE_FROM = 1025
"""Tokens from which a 16-bit product is expected to be faster on weights that are dequantized once, the first behind
the bucket of 1024: that costs about a sixth of the product at 4096 tokens, and less than it gains from half as many
instructions in the inner loop."""
WARPS = 16
"""Warps that are wanted on each multiprocessor, so that enough loads are in flight; K is split to get them."""
STEPS = 4
"""Steps of K that each split keeps at least: a shorter loop never fills its pipeline."""


def heuristic(device: Device, weight: Weight, tokens: int) -> Config | None:
    """What is expected of code that was compiled and not timed; docs/how/kernels.md has the reasons."""
    if not weight.int8 and tokens >= DENSE_FROM:
        return None
    config = _tile(device, weight, tokens)
    depth = _depth(weight, config.BK)
    if depth is None:
        return None
    tiles = -(-weight.rows // config.BN) * -(-tokens // config.BM)
    steps = -(-weight.columns // depth)
    split = 1
    while tokens <= 64 and tiles * split * config.warps < WARPS * device.processors and 2 * split * STEPS <= steps:
        split *= 2
    return replace(config, BK=depth, split_k=split, scale_weights=tokens > 64 and not weight.int8)


def _tile(device: Device, weight: Weight, tokens: int) -> Config:
    """The largest of those that tests/kernels/test_aot_linear.py holds to spill no registers."""
    hopper = device.capability >= (9, 0)
    if tokens <= 64:
        if hopper and not weight.int8 and 1 < tokens <= 16:
            return Config(128, 16, 128, warps=8, stages=4)  # with 64 outputs, L2 would read as much of x as of weights
        depth = 128 if tokens <= 32 or weight.int8 else 64
        return Config(64, max(16, bucket_of(tokens)), depth, warps=4, stages=4 if hopper or tokens <= 16 else 3)
    if tokens <= 256 or not hopper or (weight.int8 and weight.group_size):
        return Config(128, 128, 128, warps=8, stages=3)
    return Config(256, 128, 128 if weight.int8 else 64, warps=8, stages=3)


def _depth(weight: Weight, wanted: int) -> int | None:
    """Inputs of a step, at most as many as wanted where there is a choice. None where integers of several groups would
    have to be added: their sums have no common scale."""
    possible: Sequence[int] = depths(weight)
    if weight.group_size is not None:
        within = [depth for depth in possible if weight.group_size % depth == 0]
        if weight.int8 and not within:
            return None
        possible = within or possible
    return max((depth for depth in possible if depth <= wanted), default=min(possible))


def depths(weight: Weight) -> tuple[int, ...]:
    """Steps that a tile of the layout can be cut into, and that hold whole groups or lie within one."""
    size = weight.group_size or 128
    least = max(32, 128 // field_widths(weight.bits)[-1]) if weight.order is Order.WGMMA else 32
    return tuple(depth for depth in (32, 64, 128) if depth >= least and 0 in (depth % size, size % depth))
