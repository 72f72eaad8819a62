"""A Hopper GPU for Triton that launches nothing: kernels are compiled for it, and calls cost what they cost in Python.

with fake_gpu():                    tensors of the CPU count as the GPU's
    ...
with counted() as builds:           which kernels Triton would compile; nothing is compiled or launched
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget

from tests.kernels.hopper import H100


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": H100.processors}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class Driver:
    """What Triton asks of a driver to compile and to launch."""

    utils, launcher_cls = _Utils(), _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def fake_gpu() -> Iterator[None]:
    from qe_kernels import ops

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(Driver())
    try:
        with patch.object(ops, "device_of", lambda device: H100):
            yield
    finally:
        driver._active = before


@contextmanager
def counted() -> Iterator[set[str]]:
    """Variants of kernels that Triton would compile: name and key. None is compiled, so each is asked for again."""
    seen: set[str] = set()

    def hook(*, key: str, fn: Any, **_: Any) -> bool:
        seen.add(f"{fn.name} {key}")
        return True  # do not compile

    with fake_gpu(), patch.object(triton.knobs.runtime, "jit_cache_hook", hook):
        yield seen
