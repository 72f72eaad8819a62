"""Seconds of calls on a GPU, and the rates that its floor is made of."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Rates:
    """Per second, measured on the machine."""

    bytes: float
    """Read and written by a copy within the device's memory."""
    flop16: float
    """Of bf16 products."""
    flop8: float
    """Of int8 products."""


def rates(device: torch.device) -> Rates:
    """As high as torch reaches them; small sizes on a CPU, where they mean nothing."""
    gpu = device.type == "cuda"
    size, copied = (8192, 2**30) if gpu else (64, 2**16)
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(size, size, device=device).bfloat16()
    codes = torch.randint(-127, 128, (size, size), device=device).to(torch.int8)
    return Rates(
        bytes=2.0 * copied / seconds([lambda: target.copy_(source)], device),
        flop16=2.0 * size**3 / seconds([lambda: a @ a], device),
        flop8=2.0 * size**3 / seconds([lambda: torch._int_mm(codes, codes.t())], device),
    )


def seconds(calls: Sequence[Call], device: torch.device, least: float = 0.02) -> float:
    """Of one call: the median over replays of a CUDA graph that makes all of them, one behind the other.

    The calls do the same work on different memory, so that the L2 cache does not help. They are made once before, which
    compiles their kernels. Replays go on for `least` seconds. On a CPU each call is made once, and no graph.
    """
    for call in calls:
        call()
    if device.type != "cuda":
        return median(_clock(call) for call in calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    found: list[float] = []
    while sum(found) < least or len(found) < 5:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return median(found[1:]) / len(calls)


def copies(size: int, device: torch.device) -> int:
    """How many tensors of `size` bytes are four times the L2 cache, and at least two."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-4 * cache // size))


def _clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
