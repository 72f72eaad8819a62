"""What every test starts from: one thread, the same numbers, the same hypothesis examples."""

import dataclasses
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

from qe_dist.core.determinism import pin

if not torch.cuda.is_available():
    # Read where a kernel is decorated, so before any is imported: its tests then run on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell without a terminal starts what it puts into the background with SIGINT ignored, and so would every command be
# that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("house", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=500, deadline=None)  # other examples every night
hypothesis.settings.load_profile("house")  # --hypothesis-profile wins


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The thread count decides the last bits of a sum."""
    pin(1)


@pytest.fixture(scope="session")
def normal() -> Callable[..., Tensor]:
    """normal(seed, *shape): standard normal numbers that depend on nothing else."""

    def draw(seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def same() -> Callable[[Any, Any], bool]:
    """Equality to the bit of dataclasses, mappings and sequences of tensors."""

    def compare(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        if dataclasses.is_dataclass(a):
            return type(a) is type(b) and compare(vars(a), vars(b))
        if isinstance(a, Mapping):
            return isinstance(b, Mapping) and a.keys() == b.keys() and all(compare(a[k], b[k]) for k in a)
        if isinstance(a, list | tuple):
            return type(a) is type(b) and len(a) == len(b) and all(map(compare, a, b))
        return a == b

    return compare
