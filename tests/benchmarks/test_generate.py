"""benchmarks/gpu/generate.py: what it compares the kernels with is the same function."""

import pytest
import torch

from benchmarks.gpu import generate
from qe_dist.core.scheme import Scheme
from qe_dist.serve import on_kernels
from tests.serve.test_group import OUTPUTS, Normal, branches, close, run, tokens, weight, whole_input


@pytest.mark.parametrize("scheme", ["w4a16g64", "w4a8", "w4a4k8"])
def test_unfused_is_the_same_function(normal: Normal, scheme: str) -> None:
    one, x = Scheme.parse(scheme), tokens(normal)
    bias = normal(12, OUTPUTS).bfloat16()
    what = (one, whole_input(normal, 8), branches(normal, 8), *weight(normal, one), x, bias)
    assert close(run(generate.UNFUSED, *what), run(on_kernels, *what))


def test_a_step_runs_through_all_blocks() -> None:
    found = generate.speed(generate.TINY, (1, 3), ("qe-extract-w4a8",), torch.device("cpu"))
    assert set(found) == {"bf16", "qe-extract-w4a8"}
    assert all(s > 0 for how in ("kernels", "unfused") for s in found["qe-extract-w4a8"][how].values())
    assert found["qe-extract-w4a8"]["bytes"] < found["bf16"]["bytes"]
