"""The prologue built ahead of time for every supported architecture."""

import pytest
from qe_kernels.down import DownConfig, down_config

from tests.kernels.aot import FROM_REGISTERS, SHARED_LIMIT, TENSOR_CORE, Build, Job, build, count

pytestmark = pytest.mark.nightly  # ptxas takes minutes; test_aot_linear.py has builds in the gate

PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132}
VALUES = {16: "*bf16:16", 8: "*i8:16", 4: "*u8:16"}
QE, EXPERTS = (384, 0), (32, 8 * 16)
"""Rows of the shared factor and of all experts: of the default recipe at the width of 72B, and of the paper's."""


def job(capability: int, config: DownConfig, rows: tuple[int, int], bits: int, known: bool) -> Job:
    """For bf16. Experts come with their router, or with `known` choices."""
    experts, router = rows[1] > 0, rows[1] > 0 and not known
    scale = None if bits == 16 else "*bf16:16"
    pointers = {
        "x": "*bf16:16",
        "shared": VALUES[bits],
        "shared_scale": scale,
        "shared_z": "*bf16:16",
        "experts": VALUES[bits] if experts else None,
        "expert_scale": scale if experts else None,
        "expert_z": "*bf16:16" if experts else None,
        "expert": "*i32:16" if known else None,
        "router": "*bf16:16" if router else None,
        "router_x": "*bf16:16" if router else None,
        "chosen": "*i32:16" if router else None,
        "partials": "*fp32:16",
        "counters": "*i32:16",
    }
    divisible = ["x_stride", "columns", "stored", "shared_rows", "expert_rows", "rank", "router_columns"]
    numbers = dict.fromkeys([*divisible, "router_stride"], "i32:16") | dict.fromkeys(["tokens", "choices"], "i32")
    tile = {"BR": config.rows, "BM": config.tokens, "BK": config.columns, "SPLIT_K": config.split_k}
    return Job(
        "qe_kernels.down:_down",
        numbers | {name: kind for name, kind in pointers.items() if kind is not None},
        tile
        | {"BE": 16, "TILE": config.rows * config.tokens}
        | {name: None for name, kind in pointers.items() if kind is None},
        capability,
        config.warps,
        config.stages,
    )


CASES = {
    f"sm_{capability}, {name}, {tokens} tokens, K {columns}": job(
        capability, down_config(tokens, sum(rows), columns, PROCESSORS[capability]), rows, bits, known
    )
    for capability in PROCESSORS
    for name, rows, bits, known, shapes in (
        ("qe", QE, 4, False, [(16, 8192), (16, 29696), (64, 8192), (512, 29696)]),
        ("experts and router", EXPERTS, 8, False, [(16, 8192)]),
        ("known experts", EXPERTS, 16, True, [(512, 8192)]),
    )
    for tokens, columns in shapes
}


@pytest.fixture(scope="module")
def builds() -> dict[str, Build]:
    return dict(zip(CASES, build(list(CASES.values())), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_build_fits_its_architecture(case: str, builds: dict[str, Build]) -> None:
    built, job = builds[case], CASES[case]
    assert (built.stack, built.spills) == (0, 0)
    assert built.shared <= SHARED_LIMIT[job.capability]
    assert built.registers <= (128 if job.constexprs["BM"] == 16 else 255)
    assert count(built.sass, TENSOR_CORE)


@pytest.mark.parametrize("case", [case for case in CASES if "qe" in case])
def test_pairs_go_from_shared_memory_through_registers_to_the_tensor_cores(case: str, builds: dict[str, Build]) -> None:
    """Each byte is copied once, and no unpacked factor is written back; no code is converted from an integer."""
    loop = builds[case].loop
    assert count(loop, "LDGSTS")
    assert not count(loop, r"STS|I2F")
    if CASES[case].capability == 90:
        assert count(loop, "HGMMA") == count(loop, FROM_REGISTERS) > 0
