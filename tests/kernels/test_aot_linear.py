"""What ptxas makes of the fused linear: registers, spills, shared memory, and the path of the weights."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
from qe_kernels.layout import code_factor
from qe_kernels.linear import Config, _Branch

from tests.kernels.aot import FROM_REGISTERS, SHARED_LIMIT, Build, Job, build, count

DECODE = Config(64, 16, 128), Config(64, 32, 128), Config(64, 64, 128)
LARGE = (
    Config(128, 128, 128, warps=8, stages=3, scale_weights=True),
    Config(256, 128, 64, warps=8, stages=3, scale_weights=True),
)


def shared(up: str, scale: str | None, rank: int = 64) -> _Branch:
    return _Branch("*bf16:16", up, scale, "i32:16", None, "i32:16", "i32:16", "i32:16", "i32:16", rank)


def routed(up: str, scale: str | None, rank: int = 16) -> _Branch:
    return _Branch("*bf16:16", up, scale, "i32:16", "i32", "i32:16", "i32:16", "i32:16", "i32:16", rank)


NO_BRANCHES = ()
QE = (shared("*u8:16", "*bf16:16"), routed("*i8:16", "*bf16:16"))
"""Shared low rank in 4 bits, routed in 8."""
ALL = (*QE, shared("*bf16:16", None), routed("*bf16:16", None), shared("*u8:16", "*bf16:16", 32))


@dataclass(frozen=True)
class Case:
    capability: int
    config: Config
    branches: tuple[_Branch, ...] = QE
    int8: bool = False
    group: int | None = 128

    def __str__(self) -> str:
        tile = f"{self.config.BN}x{self.config.BM}x{self.config.BK}"
        kind = f"a{8 if self.int8 else 16}g{self.group}"
        return f"sm{self.capability}-{tile}-{kind}-{len(self.branches)}branches"

    @property
    def job(self) -> Job:
        config = self.config
        scaling = "accumulator" if self.group and self.group % config.BK == 0 else "weight"
        scaling = "weight" if config.scale_weights else "output" if self.group is None else scaling
        signature = {
            "base": "*i8:16" if self.int8 else "*bf16:16",
            "planes": ("*u8:16",) * 3,
            "scale": "*bf16:16",
            "branches": self.branches,
            "y": "*bf16:16",
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
            "BITS": 4,
            "WGMMA": self.capability == 90,
            "FACTOR": code_factor(4, self.int8),
            "GROUP": self.group,
            "SCALING": scaling,
            "BN": config.BN,
            "BM": config.BM,
            "BK": config.BK,
            "SPLIT_K": config.split_k,
            "PARTS": config.split_k + (config.split_k > 1 and len(self.branches) > 0),
            "GROUP_M": config.group_m,
            "EVEN_K": True,
        }
        return Job("qe_kernels.linear:_linear", signature, constexprs, self.capability, config.warps, config.stages)


DECODE_CASES = [
    *(Case(90, config, branches) for config in DECODE for branches in (NO_BRANCHES, QE)),
    *(Case(90, config, int8=True, group=None) for config in DECODE),
    Case(90, DECODE[0], int8=True),
    Case(90, replace(DECODE[0], split_k=8), ALL),
    *(Case(capability, DECODE[0], int8=int8) for capability in (80, 86, 89) for int8 in (False, True)),
]
LARGE_CASES = [
    *(Case(90, config) for config in LARGE),
    *(Case(90, config, int8=True, group=None) for config in LARGE),
    *(Case(80, LARGE[0], int8=int8, group=None) for int8 in (False, True)),
]


@pytest.fixture(scope="module")
def built() -> dict[Case, Build]:
    cases = [*DECODE_CASES, *LARGE_CASES]
    return dict(zip(cases, build([case.job for case in cases]), strict=True))


@pytest.mark.parametrize("case", [*DECODE_CASES, *LARGE_CASES], ids=str)
def test_nothing_spills_and_all_fits(built: dict[Case, Build], case: Case) -> None:
    found = built[case]
    assert found.stack == 0
    assert found.spills == 0
    assert found.shared <= SHARED_LIMIT[case.capability]


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_four_blocks_of_a_decode_tile_fit_a_processor(built: dict[Case, Build], case: Case) -> None:
    """Of 65536 registers; the more blocks, the more bytes are in flight."""
    assert built[case].registers <= 128


@pytest.mark.parametrize("case", [*DECODE_CASES, *LARGE_CASES], ids=str)
def test_weights_go_from_the_load_to_the_tensor_core(built: dict[Case, Build], case: Case) -> None:
    """Asynchronous 16-byte copies to shared memory, from there to registers, and nothing back."""
    loop = built[case].loop
    assert count(loop, r"LDGSTS\S*\.128") == count(loop, "LDGSTS") > 0
    assert count(loop, "STS") == 0
    if case.capability == 90:
        assert count(loop, FROM_REGISTERS) == count(loop, "[HI]GMMA") > 0
