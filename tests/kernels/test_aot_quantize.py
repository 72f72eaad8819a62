"""Ahead-of-time builds of the token quantizer: a row stays in registers, without spills, on every target."""

import pytest
from qe_kernels.quantize import warps

from tests.kernels.aot import SHARED_LIMIT, Build, Job, build, count

WIDTHS = {8192: 8192, 29696: 32768}
"""The inputs of the large model's linears, and the power of two that holds them."""

PLAIN = {"x": "*bf16:16", "x_stride": "i64:16", "columns": "i32:16", "base": "*i8:16", "token_scale": "*fp32:16"}
PREPARED = {"prepared": "*bf16:16", "input_scale": "*fp32:16"}
KEPT = {"base": "*bf16:16"}
FP16 = dict.fromkeys(("x", "prepared", "base"), "*fp16:16")
NORM = {"norm_weight": "*bf16:16", "eps": "fp32"}
EXTRACTS = {
    "extracted": "*u8:16",
    "expert": "*i32:16",
    **{f"{kind}_channels": "*i32:16" for kind in ("shared", "expert", "salient")},
    **{f"{kind}_z": "*bf16:16" for kind in ("shared", "expert", "salient")},
    "modality": "*i8:16",
}
POINTERS = {**PLAIN, **PREPARED, **NORM, **EXTRACTS}

VARIANTS = {
    "int8": (PLAIN, {}),
    "norm int8": (PLAIN | PREPARED | NORM, {}),
    "gated int8": (PLAIN | PREPARED, {"GATED": True}),
    "kept": (PLAIN | KEPT, {"KEPT": 64, "TOP": 31}),
    "norm kept": (PLAIN | PREPARED | NORM | KEPT, {"KEPT": 64, "TOP": 7}),
    "gated kept": (PLAIN | PREPARED | KEPT, {"GATED": True, "KEPT": 64, "TOP": 7}),
    "norm extracts": (PLAIN | PREPARED | NORM | EXTRACTS, {"SHARED": 64, "EXPERT": 32, "SALIENT": 96}),
    "gated fp16 kept": (
        PLAIN | PREPARED | {"x": "*fp16:16", "prepared": "*fp16:16", "base": "*fp16:16"},
        {"GATED": True, "KEPT": 64},
    ),
}


def job(capability: int, columns: int, variant: str) -> Job:
    signature, given = VARIANTS[variant]
    absent = dict.fromkeys(POINTERS.keys() - signature.keys())
    sizes = {"SHARED": 0, "EXPERT": 0, "SALIENT": 0, "GATED": False, "TOP": 127, "KEPT": 0, "BLOCK": WIDTHS[columns]}
    if "KEPT" in given:
        signature, absent = {k: v for k, v in signature.items() if k != "token_scale"}, absent | {"token_scale": None}
    return Job(
        "qe_kernels.quantize:_quantize", signature, absent | sizes | given, capability, warps(WIDTHS[columns]), stages=1
    )


JOBS = {(c, k, v): job(c, k, v) for c in SHARED_LIMIT for k in WIDTHS for v in VARIANTS}


@pytest.fixture(scope="module")
def builds() -> dict[tuple[int, int, str], Build]:
    return dict(zip(JOBS, build(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("key", JOBS, ids=str)
def test_the_row_fits_into_registers(builds: dict[tuple[int, int, str], Build], key: tuple[int, int, str]) -> None:
    built = builds[key]
    assert built.stack == 0
    assert built.spills == 0
    assert built.registers <= 64  # 1024 threads may have no more; with fewer threads, programs share a multiprocessor
    assert built.shared <= 4096


@pytest.mark.parametrize("key", JOBS, ids=str)
def test_rows_are_loaded_by_128_bits(builds: dict[tuple[int, int, str], Build], key: tuple[int, int, str]) -> None:
    threads = 32 * warps(WIDTHS[key[1]])
    halves = 2 if VARIANTS[key[2]][1].get("GATED") else 1
    assert count(builds[key].sass, r"LDG\.E\.128") >= halves * WIDTHS[key[1]] // threads // 8
