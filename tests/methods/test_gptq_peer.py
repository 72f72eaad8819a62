"""Our GPTQ against llm-compressor's, which is not installed here: against the errors that it left on the same weights
and Gram matrices, as benchmarks/quality/gptq_peer.py wrote them down. The problems are made anew from their seeds."""

import json
from typing import Any

import pytest

from benchmarks.quality.gptq_peer import CASES, RESULT, Case, ours, problem, relative
from qe_dist.numerics.grid import dequantize, round_to_grid, weight_scale

WRITTEN: list[dict[str, Any]] = json.loads(RESULT.read_text(encoding="utf-8"))["cases"]


def case_of(row: dict[str, Any]) -> Case:
    return Case(**{name: row[name] for name in Case.__dataclass_fields__})


SMALL = [row for row in WRITTEN if case_of(row) in CASES]


def test_every_case_was_written_down() -> None:
    assert [case_of(row) for row in SMALL] == CASES


@pytest.mark.parametrize("row", SMALL, ids=lambda row: str(tuple(vars(case_of(row)).values())))
def test_it_leaves_the_same_error(row: dict[str, Any]) -> None:
    case = case_of(row)
    weight, gram = problem(case)
    scale = weight_scale(weight, case.bits, case.group_size)
    plain = dequantize(round_to_grid(weight, scale, case.bits), scale)
    assert relative(weight, plain, gram) == pytest.approx(row["plain_rounding"], rel=1e-3)  # the same problem
    assert relative(weight, ours(case, weight, gram), gram) == pytest.approx(row["peer"], rel=0.01)


@pytest.mark.parametrize("row", WRITTEN, ids=lambda row: str(tuple(vars(case_of(row)).values())))
def test_it_left_the_same_error_when_both_ran(row: dict[str, Any]) -> None:
    assert row["ours"] == pytest.approx(row["peer"], rel=0.01)
    assert row["peer"] < 0.7 * row["plain_rounding"]
