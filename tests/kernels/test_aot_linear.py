"""What ptxas makes of the fused linear: registers, spills, shared memory, and the path of the weights."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
from qe_kernels.branches import Argument
from qe_kernels.layout import Order, code_factor, order_for
from qe_kernels.linear import Config

from tests.gate import in_gate
from tests.kernels.aot import FROM_REGISTERS, SHARED_LIMIT, TENSOR_CORE, Build, Job, build, count

DECODE = Config(64, 16, 128)
LARGE = Config(128, 128, 128, warps=8, stages=3, scale_weights=True)


def shared(bits: int) -> Argument:
    """A branch for bf16, as Triton names its arguments."""
    up, scale = ("*bf16:16", None) if bits == 16 else ("*u8:16", "*bf16:16")
    return Argument("*bf16:16", up, scale, "i32:16", "i32:16", None, bits, 0, False)


def routed(bits: int, rank: int = 32, compact: bool = False) -> Argument:
    return shared(bits)._replace(experts="i32", RANK=rank, COMPACT=compact)


def of_dtype(branch: Argument, dtype: str) -> Argument:
    """Scales stay in bf16."""
    return branch._replace(z=branch.z.replace("bf16", dtype), up=branch.up.replace("bf16", dtype))


NO_BRANCHES = ()
QE = (shared(4), routed(8))
"""Shared low rank in 4 bits, routed in 8."""
ALL = (*QE, shared(16), routed(16, compact=True), shared(4))


@dataclass(frozen=True)
class Case:
    capability: int
    config: Config
    branches: tuple[Argument, ...] = QE
    int8: bool = False
    group: int | None = 128
    bits: int = 4
    dtype: str = "bf16"

    def __str__(self) -> str:
        tile = f"{self.config.BN}x{self.config.BM}x{self.config.BK}"
        kind = f"w{self.bits}a{8 if self.int8 else 16}g{self.group}{'w' * self.config.scale_weights}"
        half = "-fp16" if self.dtype == "fp16" else ""
        return f"sm{self.capability}-{tile}-{kind}-{len(self.branches)}branches{half}"

    @property
    def job(self) -> Job:
        config = self.config
        in_register = config.scale_weights or (self.group and self.group % config.BK)
        scaling = "output" if self.group is None else "weight" if in_register else "accumulator"
        signature = {
            "base": "*i8:16" if self.int8 else f"*{self.dtype}:16",
            "planes": ("*u8:16",) * 3,
            "scale": "*bf16:16",
            "branches": tuple(of_dtype(branch, self.dtype) for branch in self.branches),
            "y": f"*{self.dtype}:16",
            "partials": "*fp32:16",
            "counters": "*i32:16",
            "M": "i32",
            **dict.fromkeys(("N", "K", "row_tiles", "column_tiles", "base_token"), "i32:16"),
        }
        if self.int8:
            signature["token_scale"] = "*fp32:16"
        if any(branch.experts for branch in self.branches):
            signature["expert"] = "*i32:16"
        constexprs: dict[str, Any] = {
            "BRANCHES": len(self.branches),
            "BITS": self.bits,
            "WGMMA": order_for(divmod(self.capability, 10)) is Order.WGMMA,
            "FACTOR": code_factor(self.bits, self.int8),
            "GROUP": self.group,
            "SCALING": scaling,
            "BN": config.BN,
            "BM": config.BM,
            "BK": config.BK,
            "SPLIT_K": config.split_k,
            "GROUP_M": config.group_m,
            "EVEN_K": True,
        }
        return Job("qe_kernels.linear:_linear", signature, constexprs, self.capability, config.warps, config.stages)


DECODE_CASES = [
    Case(90, DECODE, NO_BRANCHES),
    Case(90, DECODE),
    Case(90, replace(DECODE, BM=32)),
    Case(90, replace(DECODE, BM=64, BK=64)),
    Case(90, replace(DECODE, scale_weights=True)),
    Case(90, replace(DECODE, BN=128, warps=8)),
    Case(90, replace(DECODE, split_k=8), ALL),
    Case(90, DECODE, int8=True, group=None),
    Case(90, replace(DECODE, BM=64), int8=True, group=None),
    Case(80, DECODE),
    Case(80, DECODE, int8=True),
    Case(86, DECODE, int8=True, group=None),
    Case(89, DECODE),
]
LARGE_CASES = [
    Case(90, LARGE),
    Case(90, replace(LARGE, BN=256, BK=64)),
    Case(90, replace(LARGE, BN=256), int8=True, group=None),
    Case(80, LARGE),
    Case(89, replace(LARGE, BK=64), int8=True, group=None),
]
CASES = [*DECODE_CASES, *LARGE_CASES]
GATE = (DECODE_CASES[1], DECODE_CASES[10])
"""Built in every `make test`: groups of bf16 on Hopper, int8 on Ampere."""


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> dict[Case, Build]:
    """The cases of this session, in two processes: most of the time is ptxas."""
    asked = {item.callspec.params["case"] for item in request.session.items if item.module is request.module}
    cases = [case for case in CASES if case in asked]
    halves = cases[0::2], cases[1::2]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(build, ([case.job for case in half] for half in halves))
    made = zip((*halves[0], *halves[1]), itertools.chain.from_iterable(found), strict=True)
    return dict(made)


@pytest.mark.parametrize("case", in_gate(GATE, CASES), ids=str)
def test_nothing_spills_and_all_fits(built: dict[Case, Build], case: Case) -> None:
    found = built[case]
    assert found.stack == 0
    assert found.spills == 0
    assert found.shared <= SHARED_LIMIT[case.capability]


@pytest.mark.parametrize("case", in_gate(GATE, DECODE_CASES), ids=str)
def test_decode_leaves_room_for_several_blocks(built: dict[Case, Build], case: Case) -> None:
    """Of 65536 registers for 512 threads, of shared memory for two blocks: latency is hidden by their number."""
    assert built[case].registers <= 128
    assert built[case].shared <= SHARED_LIMIT[case.capability] // 2


@pytest.mark.parametrize("case", in_gate(GATE, CASES), ids=str)
def test_weights_do_not_go_back_to_shared_memory(built: dict[Case, Build], case: Case) -> None:
    if case.capability < 90 and not case.int8 and not case.job.constexprs["WGMMA"]:
        pytest.xfail("before 3.9, Triton exchanges 16-bit weights through shared memory on Ampere and Ada")
    loop = built[case].loop
    assert count(loop, TENSOR_CORE) > 0
    assert count(loop, "STS") == 0
    if case.capability == 90:
        assert count(loop, FROM_REGISTERS) == count(loop, TENSOR_CORE)


@pytest.mark.parametrize("case", in_gate(GATE, [case for case in DECODE_CASES if case.config.BK == 128]), ids=str)
def test_decode_copies_16_bytes_at_a_time(built: dict[Case, Build], case: Case) -> None:
    """Neighbouring threads copy neighbouring 16 bytes; only scales of weights and of routed experts go by 4. From 64
    tokens on, registers leave room for less of a branch at a time."""
    main, *branches = built[case].loops
    assert len(branches) == len(case.branches)
    scaled = [case.config.scale_weights, *(branch.RANK > 0 and branch.BITS < 16 for branch in case.branches)]
    checked = (main, *branches) if case.config.BM < 64 else (main,)
    for loop, scales in zip(checked, scaled, strict=False):
        assert count(loop, r"LDGSTS\S*\.128") >= 3
        assert count(loop, "LDGSTS") - count(loop, r"LDGSTS\S*\.128") == scales
    assert count(main, r"LDGSTS\S*\.128 .*\+0x10\]") == 0


@pytest.mark.parametrize("case", in_gate(GATE, CASES), ids=str)
def test_no_loop_loads_to_registers(built: dict[Case, Build], case: Case) -> None:
    """But the scales of the next step, one for each of a thread's rows: two bytes are too few to be copied."""
    main, *branches = built[case].loops
    assert [count(loop, r"LDG\b") for loop in branches] == [0] * len(branches)
    if case.capability == 90:
        assert count(main, r"LDG\b") == (2 if case.job.constexprs["SCALING"] == "accumulator" else 0)
