"""The prologue built ahead of time for every supported architecture."""

import pytest
from qe_kernels.down import DownConfig, down_config

from tests.kernels.aot import SHARED_LIMIT, Build, Job, build, count

PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132}
STORED = {"16": "*bf16:16", "8": "*i8:16", "4": "*u8:16"}
QE = (384, 0)
EXPERTS = (32, 8 * 16)
"""Rows of the shared factor and of all experts: the default recipe at 72B width, and the paper's."""


def job(capability: int, rows: tuple[int, int], storage: str, config: DownConfig, known: bool = False) -> Job:
    """A launch for bf16; with experts also the router, or `known` choices."""
    experts, router = rows[1] > 0, rows[1] > 0 and not known
    scale = "*bf16:16" if storage != "16" else None
    pointers = {
        "x": "*bf16:16",
        "shared": STORED[storage],
        "shared_scale": scale,
        "shared_z": "*bf16:16",
        "experts": STORED[storage] if experts else None,
        "expert_scale": scale if experts else None,
        "expert_z": "*bf16:16" if experts else None,
        "expert": "*i32:16" if known else None,
        "router": "*bf16:16" if router else None,
        "router_x": "*bf16:16" if router else None,
        "chosen": "*i32:16" if router else None,
        "partials": "*fp32:16",
        "counters": "*i32:16",
    }
    numbers = {
        **{name: "i32:16" for name in ("x_stride", "columns", "shared_stride", "shared_rows", "expert_stride")},
        **{name: "i32:16" for name in ("expert_rows", "rank", "router_columns", "router_stride")},
        **{name: "i32" for name in ("tokens", "choices")},
    }
    constants = {
        "BR": config.rows,
        "BM": config.tokens,
        "BK": config.columns,
        "BE": 16,
        "TILE": config.rows * config.tokens,
        "SPLIT_K": config.split_k,
    }
    return Job(
        "qe_kernels.down:_down",
        numbers | {name: kind for name, kind in pointers.items() if kind is not None},
        constants | {name: None for name, kind in pointers.items() if kind is None},
        capability,
        config.warps,
        config.stages,
    )


TILES = [
    pytest.param(tokens, columns, id=f"{tokens} tokens, K = {columns}")
    for tokens, columns in [(16, 8192), (16, 29696), (64, 8192), (64, 29696), (128, 8192), (128, 29696)]
]
