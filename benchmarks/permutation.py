"""What SERQ's offline permutation could save: reading salient channels side by side against one by one.

    python benchmarks/permutation.py          writes benchmarks/results/permutation.json

Salient channels are 128 columns of the rounded input (arXiv 2603.08185). A permutation puts them first; without it they
are gathered by index. No output changes, so the time is all there is to gain. Timed on this CPU in float32, seconds of
one thread: the read, the product with the stored term, and that of the codes, at the widths of Qwen2-VL-2B.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from qe_pipelines.results import write_result
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
SALIENT, REPEATS = 128, 31
GROUPS = {"qkv": (1536, 2048), "o": (1536, 1536), "gate and up": (1536, 17920), "down": (8960, 1536)}
"""Inputs, outputs."""
TOKENS = (1, 256)


def seconds(call: Callable[[], object]) -> float:
    """Of this process in the median call, the first ones left out: others share the machine."""
    times = []
    for _ in range(REPEATS + 3):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return median(times[3:])


def measure(tokens: int, inputs: int, outputs: int) -> dict[str, float]:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(tokens, inputs, generator=random), torch.randn(outputs, inputs, generator=random)
    term = torch.randn(outputs, SALIENT, generator=random)
    scattered = torch.randperm(inputs, generator=random)[:SALIENT]
    z = x[:, scattered]
    found = {
        "codes": seconds(lambda: x @ weight.T),
        "term": seconds(lambda: z @ term.T),
        "contiguous": seconds(lambda: x[:, :SALIENT].contiguous()),
        "scattered": seconds(lambda: x.index_select(1, scattered)),
    }
    saved = found["scattered"] - found["contiguous"]
    return {k: 1e6 * v for k, v in found.items()} | {"share": saved / (found["codes"] + found["term"])}


def table_of(cases: list[dict[str, Any]]) -> Table:
    table = Table("group", "tokens", "codes us", "term us", "contiguous us", "scattered us", "saved")
    for case in cases:
        times = [f"{case[k]:.1f}" for k in ("codes", "term", "contiguous", "scattered")]
        table.add_row(case["group"], str(case["tokens"]), *times, f"{case['share']:.2%}")
    return table


def main() -> None:
    torch.set_num_threads(1)
    cases = [
        {"group": name, "tokens": tokens} | measure(tokens, *shape)
        for name, shape in GROUPS.items()
        for tokens in TOKENS
    ]
    Console().print(table_of(cases))
    write_result(RESULTS / "permutation.json", {"salient": SALIENT, "cases": cases})


if __name__ == "__main__":
    sys.exit(main())
