"""What machine this is."""

import ctypes
import platform
import time
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's model where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def matmul_rate(device: str, dtype: torch.dtype, size: int = 1024) -> float:
    """Multiply-adds per second of a square product with the threads that torch has now; best of three."""
    x = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return size**3 / best


def give_back_memory() -> None:
    """Lets the C library return freed memory to the system. glibc keeps what lies between living allocations, several
    hundred MiB of a worker, and more with every block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
