"""Ahead-of-time builds of the token quantizer, at the widths of the large model: rows stay in registers."""

from typing import Any

import pytest
from qe_kernels.quantize import _quantize, warps

from tests.kernels.aot import SHARED_LIMIT, Build, Job, build, count

pytestmark = pytest.mark.nightly  # ptxas takes minutes; test_aot_linear.py has builds in the gate

HIDDEN, INTERMEDIATE = 8192, 29696
BLOCK = {HIDDEN: 8192, INTERMEDIATE: 32768}

PLAIN = {"x": "*bf16:16", "x_stride": "i64:16", "columns": "i32:16"}
INT8 = {"base": "*i8:16", "token_scale": "*fp32:16"}
UNROUNDED = {"base": "*bf16:16"}
SCALED = {"prepared": "*bf16:16", "input_scale": "*fp32:16"}
NORM = {"norm_weight": "*bf16:16", "eps": "fp32"}
FP16 = dict.fromkeys(("x", "prepared", "base"), "*fp16:16")
EXTRACTED = {
    **{"modality": "*i8:16", "expert": "*i32:16", "extracted": "*u8:16"},
    **{f"{of}_channels": "*i32:16" for of in ("shared", "expert", "salient")},
    **{f"{of}_z": "*bf16:16" for of in ("shared", "expert", "salient")},
}
LISTS = {"SHARED": 64, "EXPERT": 32, "SALIENT": 96}

VARIANTS: dict[str, tuple[int, dict[str, str], dict[str, Any]]] = {
    "norm, int8": (HIDDEN, PLAIN | SCALED | NORM | INT8, {}),
    "norm, outliers": (HIDDEN, PLAIN | SCALED | NORM | UNROUNDED, {"OUTLIERS": 64}),
    "norm, extracted, int8": (HIDDEN, PLAIN | SCALED | NORM | EXTRACTED | INT8, LISTS),
    "gated, int8": (INTERMEDIATE, PLAIN | SCALED | INT8, {"GATED": True}),
    "gated, outliers": (INTERMEDIATE, PLAIN | SCALED | UNROUNDED, {"GATED": True, "OUTLIERS": 64}),
    "gated, outliers, fp16": (INTERMEDIATE, PLAIN | SCALED | FP16, {"GATED": True, "OUTLIERS": 64}),
    "gated, extracted, int8": (INTERMEDIATE, PLAIN | SCALED | EXTRACTED | INT8, LISTS | {"GATED": True}),
    "outliers": (INTERMEDIATE, PLAIN | UNROUNDED, {"OUTLIERS": 64}),
}
FEWER = ("norm, outliers", "gated, int8", "gated, outliers")
"""For the targets that differ little from sm_80."""
SPILLS = {(80, "norm, extracted, int8"): 4, (86, "gated, outliers"): 4, (89, "gated, outliers"): 4}
"""Loads and stores of one pointer: the first by ptxas of Triton 3.6, the others of 3.7; none of 3.9."""


def job(capability: int, variant: str) -> Job:
    columns, signature, given = VARIANTS[variant]
    defaults = {
        "SHARED": 0,
        "EXPERT": 0,
        "SALIENT": 0,
        "GATED": False,
        "TOP": 127,
        "OUTLIERS": 0,
        "BLOCK": BLOCK[columns],
    }
    absent = dict.fromkeys(name for name in _quantize.arg_names if name not in signature)
    constexprs = absent | defaults | given
    return Job("qe_kernels.quantize:_quantize", signature, constexprs, capability, warps(constexprs["BLOCK"]), stages=1)


JOBS = {(c, v): job(c, v) for c in SHARED_LIMIT for v in VARIANTS if c in (80, 90) or v in FEWER}


@pytest.fixture(scope="module")
def builds() -> dict[tuple[int, str], Build]:
    return dict(zip(JOBS, build(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("key", JOBS, ids=str)
def test_the_row_fits_into_registers(builds: dict[tuple[int, str], Build], key: tuple[int, str]) -> None:
    """64 are all that 1024 threads can have, and let two programs of 512 share a multiprocessor."""
    built = builds[key]
    assert built.spills <= SPILLS.get(key, 0)
    assert built.stack <= 2 * SPILLS.get(key, 0)
    assert built.registers <= 64
    assert built.shared <= 32 * 1024


@pytest.mark.parametrize("key", JOBS, ids=str)
def test_rows_are_read_and_written_by_16_bytes(builds: dict[tuple[int, str], Build], key: tuple[int, str]) -> None:
    """All else is the few channels by index, and the token's expert, modality and scale."""
    sass = builds[key].sass
    assert count(sass, r"LDG\.E\.128") >= 4
    assert count(sass, r"STG\.E\.128") >= 2
    if "EXPERT" not in VARIANTS[key[1]][2]:
        assert count(sass, "LDG") == count(sass, r"LDG\.E\.128")
        assert count(sass, "STG") - count(sass, r"STG\.E\.128") <= 1


@pytest.mark.parametrize("key", JOBS, ids=str)
def test_dividing_by_the_scale_takes_no_branch(builds: dict[tuple[int, str], Build], key: tuple[int, str]) -> None:
    """div.rn calls a function where its fast path fails: needed for the scale and its inverse, not for each value."""
    assert count(builds[key].sass, r"CALL\.REL") <= 3
