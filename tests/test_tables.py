"""No number of a table is typed: those of the README and docs are what benchmarks/tables.py makes of the results."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qe_dist import archs

ROOT = Path(__file__).parent.parent


def test_tables_are_what_the_results_say():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_table_has_its_result():
    for name in ("demo", "pipeline", "channels", "models", "gptq_peer", "sensitivity", "league"):
        assert (ROOT / "benchmarks" / "results" / f"{name}.json").exists()


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("tables")


ENVIRONMENT = {"command": "league.py", "commit": "abc", "date": "today", "machine": "one", "versions": {"torch": "2"}}
SAMPLES = 12


def entry(recipe: str, kl: float, bits: float = 4.0, **others: Any) -> dict[str, Any]:
    """With the same KL of every sample, so that intervals are points."""
    scores = {
        "index": list(range(SAMPLES)), "kind": ["text"] * SAMPLES, "modality": ["text"] * SAMPLES,
        "tokens": [2] * SAMPLES, "exact": [False] * SAMPLES, "nll": [1.0] * SAMPLES, "kl": [2 * kl] * SAMPLES,
        "agreed": [1] * SAMPLES,
    }  # fmt: skip
    measured = {
        "recipe": recipe, "scheme": "w4a6", "bits": bits, "active_bits": bits, "macs": 1.0, "accuracy": None,
        "perplexity": 2.0, "kl": kl, "fit_seconds": 3.0, "fallbacks": 0, "kinds": {}, "arithmetic": "int8",
        "agreement": 0.5, "mib": 90.0, "intervals": {"kl": [kl, kl]}, "scores": scores,
        "modalities": {"text": {"kl": kl}, "image": {"kl": 2 * kl}},
    }  # fmt: skip
    return measured | others


TEST = [
    entry("lost-w4a6", 0.3, bits=4.5),
    entry("good-w4a6", 0.1, bits=4.5),
    entry("small-w4a6", 0.2),
    entry("gptq-w4a16g64", 0.05, scheme="w4a16", arithmetic="a16", control=True),
]
RESULT = {"environment": ENVIRONMENT, "models": {"lm": {"test": TEST, "development": [entry("good-w4a6", 0.15)]}}}


def rows_of(text: str) -> list[list[str]]:
    """Of the table in it, header first."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_the_league_is_grouped_by_arithmetic_and_sorted_by_loss(tables):
    text = tables.league(RESULT, "lm")
    a16, int8 = (rows_of(part) for part in text.split("Product in int8:"))
    assert [row[0] for row in a16[1:]] == ["**gptq-w4a16g64**"]
    assert [row[0] for row in int8[1:]] == ["**good-w4a6**", "**small-w4a6**", "lost-w4a6"]
    best = dict(zip(*int8[:2], strict=True))
    assert best == {
        "recipe": "**good-w4a6**", "format": "w4a6", "bits/weight": "4.50", "bits read": "4.50", "MiB": "90",
        "KL, 95 %": "0.1000 [0.10000, 0.10000]",
        "less that of the control, 95 %": "+0.05000 [+0.05000, +0.05000]", "control": "gptq-w4a16g64",
        "agreement": "50.0%", "perplexity": "2.00", "KL, development": "0.1500",
    }  # fmt: skip


def test_where_there_are_images_the_league_tells_modalities_apart(tables):
    rows = [entry("good-w4a6", 0.1, accuracy=0.75)]
    header, row = rows_of(tables.league({"environment": ENVIRONMENT, "models": {"vlm": {"test": rows}}}, "vlm"))
    assert header[-4:] == ["exact match", "KL after images", "KL of text", "KL, development"]
    assert row[-4:] == ["75.0%", "0.2000", "0.1000", ""]


def test_what_is_recommended_has_its_row(tables):
    """That of a rotation in bands is the one of all channels, which computes the same on the real model."""
    names = ("gptq-w4a16g64", "qe-w4a16g64", "qe-w4a8g64", "hadamard+gptq+qera-w4a6g64@0.45f4", "qe-paper+gptq-w4a6")
    rows = [entry(name, 0.1 * number, accuracy=0.5) for number, name in enumerate(names, 1)]
    shown = rows_of(tables.recommended({"environment": ENVIRONMENT, "models": {"vlm": {"test": rows}}}))[1:]
    assert {row[1]: row[2] for row in shown} == {
        "`qe-w4a16g64`": "0.200", "`qe-w4a8g64`": "0.300", "`qe-w4a6g64`": "0.400", "`gptq-w4a16g64`": "0.100",
        "`qe-paper+gptq-w4a6`": "0.500",
    }  # fmt: skip


def test_what_was_not_measured_is_said(tables):
    assert tables.league(RESULT, "vlm").strip() == "Not measured yet."


def test_a_table_without_a_result_stays_as_it_is(tables, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = "<!-- table: league lm -->\nas it was\n<!-- end -->\n"
    assert tables.rendered(text) == text
    (tmp_path / "league.json").write_text(json.dumps(RESULT))
    assert "**good-w4a6**" in tables.rendered(text)
    assert tables.rendered(tables.rendered(text)) == tables.rendered(text)


def test_gptq_beside_the_peers(tables):
    case = {
        "outputs": 8, "inputs": 16, "bits": 4, "group_size": None, "act_order": True, "plain_rounding": 0.2,
        "ours": 0.1, "peer": 0.125, "seconds": 1.0, "peer_seconds": 2.0, "gflop": 5.0,
    }  # fmt: skip
    result = {"environment": ENVIRONMENT, "gflop_per_second": 10.0, "cases": [case]}
    assert rows_of(tables.gptq_peer(result))[1] == [
        "8 x 16", "4", "row", "by size", "0.2000", "0.1000", "0.1250", "0.8000", "1.00", "2.00", "0.50",
    ]  # fmt: skip


KERNELS = {
    "environment": ENVIRONMENT, "device": "H100", "rates": {"bytes": 3e12, "flop16": 8e14, "flop8": 1.4e15},
    "peers": {"gemlite": "ran"},
    "rows": [
        {"model": "72B", "layer": "qkv", "tokens": 1, "format": format, "repair": repair, "part": part,
         "seconds": 2e-5, "floor": 1e-5}
        for format, repair, part in (
            ("bf16", "bare", "torch"), ("w4a8", "bare", "linear"), ("w4a8", "bare", "whole"),
            ("w4a8", "shared", "unfused"), ("w4a16g128", "bare", "gemlite"),
        )
    ],
    "targets": [
        {"name": "a", "at_least": True, "wanted": 0.8, "found": 0.85, "met": True},
        {"name": "b", "at_least": False, "wanted": 1.06, "found": 1.2, "met": False},
        {"name": "c", "at_least": True, "wanted": 1.6, "found": None, "met": None},
    ],
}  # fmt: skip


def test_kernels_beside_their_targets(tables):
    assert rows_of(tables.kernel_targets(KERNELS))[1:] == [
        ["a", "at least 0.80", "0.85", "yes"], ["b", "at most 1.06", "1.20", "NO"],
        ["c", "at least 1.60", "not run", ""],
    ]  # fmt: skip


def test_kernels_beside_their_floors(tables):
    header, row = rows_of(tables.kernel_times(KERNELS, "72B"))
    assert header == ["layer", "M", "bf16", "w4a8 bare", "w4a8 shared unfused", "w4a16g128 bare gemlite"]
    assert row == ["qkv", "1"] + ["20.0 (50%)"] * 4


def test_kernels_built_ahead_of_time(tables):
    build = {
        "kernel": "linear", "case": "decode", "capability": 90, "warps": 4, "stages": 5, "registers": 71, "spills": 0,
        "shared": 28672, "weights_from_registers": True,
    }  # fmt: skip
    builds = [
        build,
        build | {"registers": 99, "shared": 1024},
        build | {"kernel": "down", "capability": 86, "spills": 1},
    ]
    result = {"environment": ENVIRONMENT, "triton": "3.9.0", "builds": builds}
    assert rows_of(tables.kernels_aot(result))[1:] == [
        ["linear", "9.0", "2", "99", "0", "28.0"], ["down", "8.6", "1", "71", "1", "28.0"],
    ]  # fmt: skip
    assert rows_of(tables.linear_aot(result))[1:] == [
        ["decode", "4/5", "71", "28.0", "yes"], ["decode", "4/5", "99", "1.0", "yes"],
    ]  # fmt: skip


def test_versions(tables):
    cases = {
        "transformers==5.16.1": {"passed": 3, "skipped": 1, "failed": [], "seconds": 2.0},
        "ray==2.59.0": {"passed": 2, "skipped": 0, "failed": ["test_it"], "seconds": 2.0},
    }
    result = {"environment": ENVIRONMENT, "cases": cases}
    assert rows_of(tables.versions(result))[1:] == [
        ["transformers 5.16.1", "3", "1", "none"], ["ray 2.59.0", "2", "0", "test_it"],
    ]  # fmt: skip


def test_families_are_those_of_the_code(tables):
    result = {"environment": ENVIRONMENT, "families": {"llama": {"streamed": [3, 3], "vLLM TP 2": [0, 1]}}}
    rows = rows_of(tables.families(result))[1:]
    assert [row[0] for row in rows] == [f"`{name}`" for name in archs.names()]
    assert rows[0][2:] == ["yes", "-", "-", "-", "-", "-", "0 of 1", "no"]


def test_code_is_quoted_as_it_is(tables):
    text = "<!-- file: tests/core/test_errors.py -->\n<!-- end -->"
    assert (ROOT / "tests/core/test_errors.py").read_text() in tables.rendered(text)
