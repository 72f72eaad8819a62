"""Ahead-of-time builds of the smallest product: how weights reach the tensor cores."""

import pytest
from qe_kernels.layout import Order, order_for

from tests.kernels.aot import FROM_REGISTERS, SHARED_LIMIT, TENSOR_CORE, Job, build, count

pytestmark = pytest.mark.nightly  # ptxas takes minutes; test_aot_linear.py has builds in the gate

DTYPES = ["bf16", "fp16", "i8"]
WEIGHTS_PER_THREAD = 64
"""Of a tile of 64 x 128, for 128 threads."""


def job(capability, dtype, bits):
    pointers = {"x": f"*{dtype}:16", "plane0": "*u8:16", "plane1": "*u8:16", "plane2": "*u8:16"}
    sizes = {"M": "i32", "N": "i32", "K": "i32:16", "row_tiles": "i32", "column_tiles": "i32"}
    result = {"y": "*i32:16" if dtype == "i8" else "*fp32:16"}
    wgmma = order_for(divmod(capability, 10)) is Order.WGMMA
    tile = {"BN": 64, "BM": 16, "BK": 128, "BITS": bits, "WGMMA": wgmma, "ASM": True}
    return Job("tests.kernels.gemm:gemm", pointers | sizes | result, tile, capability)


JOBS = {(capability, dtype, 4): job(capability, dtype, 4) for capability in SHARED_LIMIT for dtype in DTYPES}
JOBS |= {(90, dtype, bits): job(90, dtype, bits) for dtype in ("bf16", "i8") for bits in (2, 3, 8)}


@pytest.fixture(scope="module")
def builds():
    return dict(zip(JOBS, build(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("key", JOBS, ids=str)
def test_leaves_room_for_several_blocks(builds, key):
    """The latency of the memory is hidden by the number of blocks on a multiprocessor."""
    built = builds[key]
    assert built.stack == 0
    assert built.spills == 0
    assert built.registers <= (80 if key[2] == 4 else 96)
    assert built.shared <= SHARED_LIMIT[key[0]] // 2


@pytest.mark.parametrize(("capability", "dtype", "bits"), [key for key in JOBS if key[0] == 90])
def test_hopper_reads_weights_from_registers(builds, capability, dtype, bits):
    """Each warpgroup product has its left operand in registers, and no weight goes back to shared memory."""
    loop = builds[capability, dtype, bits].loop
    steps = 128 // (32 if dtype == "i8" else 16)
    assert count(loop, FROM_REGISTERS) == count(loop, TENSOR_CORE) == steps
    assert count(loop, "STS") == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [80, 86, 89])
def test_ampere_does_not_write_weights_back_either(builds, capability, dtype):
    if dtype != "i8" and not JOBS[capability, dtype, 4].constexprs["WGMMA"]:
        pytest.xfail("before 3.9, Triton exchanges 16-bit weights through shared memory on Ampere and Ada")
    loop = builds[capability, dtype, 4].loop
    assert count(loop, TENSOR_CORE) > 0
    assert count(loop, "STS") == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thread_loads_its_nibbles_by_128_bits(builds, dtype):
    loads = r"LDS\S* R\d"  # ptxas also emits loads to nowhere, as fences
    loop = builds[90, dtype, 4].loop
    assert count(loop, r"LDS\.128") == count(loop, loads) == WEIGHTS_PER_THREAD // 32


@pytest.mark.parametrize(
    ("dtype", "bits", "per_weight"),
    [
        *[("bf16", 4, 1.5), ("fp16", 4, 1.5), ("bf16", 2, 1.6), ("bf16", 3, 3.5), ("bf16", 8, 3.0)],
        *[("i8", 4, 0.5), ("i8", 2, 0.6), ("i8", 3, 1.3), ("i8", 8, 0.1)],
    ],
)
def test_unpacking_costs_few_instructions(builds, dtype, bits, per_weight):
    """11 instructions for 8 nibbles to 16 bits, and 3 to int8: far from what a conversion of each would cost."""
    arithmetic = r"(LOP3|SHF|HADD2|HFMA2|PRMT|I2F|IMAD\.(SHL|U32))"
    assert count(builds[90, dtype, bits].loop, arithmetic) <= per_weight * WEIGHTS_PER_THREAD
