"""A kernel with its constants: compiled once, then launched without Triton's search for the variant that fits.

Triton binds the arguments of every call, derives a key from their types, alignments and divisibility, and looks the
kernel up. All of that is fixed at load here, but for the tensors that come and go; these are aligned whenever torch
allocates them. So a `Launch` keeps the compiled kernel and hands it its arguments.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from qe_kernels.triton_if_any import INTERPRET

log = logging.getLogger(__name__)


class Launch:
    """One kernel, for arguments that differ in nothing that Triton compiles for."""

    def __init__(self, function: Any, constants: tuple[Any, ...], warps: int, stages: int | None = None) -> None:
        """constants: the last parameters of the kernel, which are constants, in their order."""
        self.function, self.constants = function, constants
        self.options = {"num_warps": warps} | ({} if stages is None else {"num_stages": stages})
        self.kernel: Any = None

    def compile(self, arguments: tuple[Any, ...]) -> None:
        """For arguments like these, without a launch."""
        if not INTERPRET and self.kernel is None:
            self.kernel = self.function.warmup(*arguments, *self.constants, grid=(1, 1, 1), **self.options)

    def __call__(self, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        if self.kernel is None:
            self.kernel = self.function[grid](*arguments, *self.constants, **self.options)
        else:
            self.kernel[grid](*arguments, *self.constants)


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, whatever the tensors lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def compile_all(name: str, device: torch.device, jobs: Sequence[Callable[[], None]]) -> None:
    """All of `jobs`, which compile, at the same time; says so where it takes more than a second.

    What Triton finds in its cache on disk takes no time: a model is compiled once on a machine. RuntimeError while a
    CUDA graph is captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"run the model once before a CUDA graph is captured: kernels for {name} are not compiled")

    def run(job: Callable[[], None]) -> None:
        with on(device):  # of this thread
            job()

    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, jobs))
    if (spent := time.monotonic() - start) > 1:
        log.info("compiled %d kernels for %s in %.0f s", len(jobs), name, spent)
