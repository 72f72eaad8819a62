"""No tile that dispatch can choose for Hopper touches a register that a running product needs, in compiled code."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from qe_kernels.dispatch import BUCKETS, heuristic
from qe_kernels.layout import Order

from tests.gate import in_gate
from tests.kernels import test_aot_down
from tests.kernels.aot import Build, build
from tests.kernels.hopper import H100, weight
from tests.kernels.sass import product
from tests.kernels.test_aot_linear import ALL, QE, Case

SHAPES = ((10240, 8192), (8192, 29696), (576, 576), (59136, 8192))
"""Of a large and of a tiny model: with K split and not."""
KINDS = [(4, int8, group, "bf16") for int8 in (False, True) for group in (None, 8, 16, 32, 64, 128)]
KINDS += [(4, False, None, "fp16"), (4, False, 128, "fp16")]
KINDS += [(bits, int8, group, "bf16") for bits in (2, 3, 5, 6, 7, 8) for int8 in (False, True) for group in (None, 128)]


def chosen(bits: int, int8: bool, group: int | None, dtype: str) -> list[Case]:
    """Every tile of `dispatch.heuristic` for this kind of weight, each once: how often K is split changes no loop."""
    found = {}
    for rows, columns in SHAPES:
        of = replace(weight(rows, columns, bits, group, int8), order=Order.WGMMA)
        for tokens in BUCKETS:
            config = heuristic(H100, of, tokens)
            if config is not None:
                case = Case(90, replace(config, split_k=min(config.split_k, 2)), QE, int8, group, bits, dtype)
                found[str(case)] = case
    return list(found.values())


CASES = [case for kind in KINDS for case in chosen(*kind)]
CASES += [replace(case, branches=ALL) for case in chosen(*KINDS[0]) if case.config.BM <= 64]
JOBS = {str(case): case.job for case in CASES}
JOBS |= {f"down {name}": job for name, job in test_aot_down.CASES.items() if job.capability == 90}
GATE = (
    "sm90-64x16x128-w4a16g128-2branches",  # test_aot_linear.py builds it, too
    "sm90-128x16x128-w4a16gNone-2branches",
    "sm90-64x16x128-w4a8gNone-2branches",
    "down sm_90, qe, 64 tokens, K 8192",
)
UNFINISHED = (GATE[1], GATE[3])


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> dict[str, Build]:
    """The jobs of this session, in two processes: most of the time is ptxas."""
    asked = {item.callspec.params["name"] for item in request.session.items if item.module is request.module}
    names = [name for name in JOBS if name in asked]
    halves = names[0::2], names[1::2]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda half: build([JOBS[name] for name in half]), halves))
    return dict(zip((*halves[0], *halves[1]), (*found[0], *found[1]), strict=True))


@pytest.mark.parametrize("name", in_gate(GATE, JOBS))
def test_no_register_is_touched_while_a_product_needs_it(built: dict[str, Build], name: str) -> None:
    assert any(product(instruction) for instruction in built[name].sass) or "router" in name
    assert built[name].hazards == []
    assert built[name].spills == 0


@pytest.mark.parametrize("name", in_gate(UNFINISHED[:1], UNFINISHED))
def test_without_the_wait_the_check_fails(name: str) -> None:
    """So the check sees what it is there for."""
    (found,) = build([replace(JOBS[name], unfinished=True)])
    assert {hazard.kind for hazard in found.hazards} == {"left operand"}
