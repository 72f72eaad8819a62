"""What tests of scripts in benchmarks/gpu share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture(scope="module")
def gpu_scripts() -> Iterator[None]:
    """Lets the scripts be imported, as they import each other."""
    pytest.importorskip("triton", reason="Triton is installed on Linux alone")
    sys.path.insert(0, str(GPU))
    yield
    sys.path.remove(str(GPU))
