"""The only place that touches torch's global state."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def pin(threads: int) -> None:
    """Fixes what decides the last bits of a result: the number of threads of this process.

    Ray gives an actor one thread, a plain process gets all cores; sums then differ in their last bits.
    """
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@contextmanager
def tensor_cores() -> Iterator[None]:
    """float32 products on a GPU read their factors with TF32's 10 bits, at eight times the speed, and sum in float32.

    For iterations that forget the errors of their steps. On a CPU nothing changes.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
