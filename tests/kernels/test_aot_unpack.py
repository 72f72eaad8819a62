"""Ahead-of-time builds of the smallest product: how weights reach the tensor cores."""

import pytest

from tests.kernels.aot import FROM_REGISTERS, SHARED_LIMIT, TENSOR_CORE, Job, build, count

DTYPES = ["bf16", "fp16", "i8"]
FORMATS = [4, 2, 3, 8]
"""Four bits by assembly; the others by plain Triton, from one plane or two."""


def job(capability, dtype, bits):
    pointers = {"x": f"*{dtype}:16", "plane0": "*u8:16", "plane1": "*u8:16", "plane2": "*u8:16"}
    sizes = {"M": "i32", "N": "i32", "K": "i32:16", "row_tiles": "i32", "column_tiles": "i32"}
    result = {"y": "*i32:16" if dtype == "i8" else "*fp32:16"}
    return Job(
        "tests.kernels.gemm:gemm",
        pointers | sizes | result,
        {"BN": 64, "BM": 16, "BK": 128, "BITS": bits, "WGMMA": capability == 90, "ASM": True},
        capability,
    )


JOBS = {(c, d, b): job(c, d, b) for c in SHARED_LIMIT for d in DTYPES for b in FORMATS if b == 4 or c in (80, 90)}


@pytest.fixture(scope="module")
def builds():
    return dict(zip(JOBS, build(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("key", JOBS, ids=str)
def test_fits_the_chip(builds, key):
    """A decode tile must leave room for several blocks on a multiprocessor: latency is hidden by their number."""
    built = builds[key]
    assert built.stack == 0
    assert built.spills == 0
    assert built.registers <= 128
    assert built.shared <= SHARED_LIMIT[key[0]] // 4
    assert count(built.loop, TENSOR_CORE) > 0


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hopper_reads_weights_from_registers(builds, dtype, bits):
    """Each warpgroup product has its left operand in registers, and no weight goes back to shared memory."""
    loop = builds[90, dtype, bits].loop
    assert count(loop, FROM_REGISTERS) == count(loop, TENSOR_CORE) == (4 if dtype == "i8" else 8)
    assert count(loop, "STS") == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [80, 86, 89])
def test_ampere_makes_no_round_trip_either(builds, capability, dtype):
    assert count(builds[capability, dtype, 4].loop, "STS") == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_hopper_loads_a_threads_nibbles_by_128_bits(builds, dtype):
    """64 x 128 nibbles are 32 bytes for each of 128 threads."""
    loop = builds[90, dtype, 4].loop
    assert count(loop, r"LDS\.128") == count(loop, "LDS") == 2


@pytest.mark.parametrize(("dtype", "per_weight"), [("bf16", 1.5), ("fp16", 1.5), ("i8", 0.5)])
def test_unpacking_costs_few_instructions(builds, dtype, per_weight):
    """Study, kernels.md 2.1: 11 instructions for 8 weights of 16 bits, 3 for 8 weights of int8."""
    arithmetic = r"(LOP3|SHF|HADD2|HFMA2|PRMT|I2F|IMAD\.SHL|IMAD\.U32)"
    assert count(builds[90, dtype, 4].loop, arithmetic) <= per_weight * 64
