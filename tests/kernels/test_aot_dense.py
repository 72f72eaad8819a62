"""The dequantizer built ahead of time."""

import pytest
from qe_kernels.layout import Order, code_factor, order_for

from tests.kernels.aot import SHARED_LIMIT, Build, Job, build

CASES = [(90, 4, False, 128), (90, 3, False, 128), (90, 4, True, 8192), (80, 4, False, 128), (86, 8, False, 32)]
"""Capability, bits, int8, group size."""


def job(capability: int, bits: int, int8: bool, group_size: int) -> Job:
    signature = {
        "planes": ("*u8:16",) * 3, "scale": "*bf16:16", "dense": "*bf16:16",
        **dict.fromkeys(("N", "K", "row_tiles", "column_tiles"), "i32:16"),
    }  # fmt: skip
    wgmma = order_for(divmod(capability, 10)) is Order.WGMMA
    constexprs = {
        "BITS": bits, "WGMMA": wgmma, "INT8": int8, "FACTOR": code_factor(bits, int8), "GROUP": group_size,
        "BN": 64, "BK": 128,
    }  # fmt: skip
    return Job("qe_kernels.dense:_dequantize", signature, constexprs, capability)


@pytest.fixture(scope="module")
def builds() -> dict[tuple, Build]:
    return dict(zip(CASES, build([job(*case) for case in CASES]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_build_fits_its_architecture(case: tuple, builds: dict[tuple, Build]) -> None:
    assert (builds[case].stack, builds[case].spills) == (0, 0)
    assert builds[case].registers <= 128
    assert builds[case].shared <= SHARED_LIMIT[case[0]]
