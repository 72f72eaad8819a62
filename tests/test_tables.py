"""No number in the README and docs is typed: their tables are what benchmarks/tables.py makes of the results."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def test_tables_are_what_the_results_say():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_table_has_its_result():
    for name in ("demo", "pipeline", "channels", "models", "peers", "gptq_peer", "sensitivity", "league", "ablation"):
        assert (ROOT / "benchmarks" / "results" / f"{name}.json").exists()


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("tables")


FULL = {"accuracy": 0.9, "perplexity": 1.25, "kinds": {"color": {"accuracy": 1.0}, "text": {"perplexity": 1.25}}}
ENVIRONMENT = {"command": "league.py", "commit": "abc", "date": "today", "machine": "one", "versions": {"torch": "2"}}


def entry(recipe: str, seed: int, kl: float, bits: float = 4.0, active: float = 4.0, **others: Any) -> dict[str, Any]:
    measured = {
        "seed": seed, "recipe": recipe, "scheme": "w4a6", "arithmetic": "int8", "bits": bits, "active_bits": active,
        "macs": 1.0,
        "accuracy": 0.5 + 0.1 * seed, "perplexity": 2.0, "kl": kl, "fit_seconds": 3.0 + seed, "fallbacks": 0,
        "kinds": {"color": {"accuracy": 0.25 * seed, "kl": kl}, "text": {"perplexity": 2.0, "kl": kl}},
    }  # fmt: skip
    return measured | others


ENTRIES = [
    entry("big-w4a6", 0, 0.001, bits=5.0),
    entry("small-w4a6", 0, 0.02, active=4.5),
    entry("lost-w4a6", 0, 0.01, bits=4.5, active=4.5, fallbacks=2),
    entry("big-w4a6", 1, 0.003, bits=5.0),
    entry("small-w4a6", 1, 0.04, active=4.5),
    entry("lost-w4a6", 1, 0.07, bits=4.5, active=4.5),
    entry("big-w4a4", 0, 0.5, scheme="w4a4"),
]
RESULT = {"environment": ENVIRONMENT, "models": {"outlier": {"full": FULL, "entries": ENTRIES}}}


def rows_of(text: str) -> list[list[str]]:
    """Of the table in it, header first."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_the_league_is_sorted_by_the_mean_over_the_seeds(tables):
    text = tables.league(RESULT, "outlier", "w4a6")
    header, full, *rows = rows_of(text)
    assert [row[0] for row in rows] == ["**big-w4a6**", "**small-w4a6**", "lost-w4a6"]
    assert all(len(row) == len(header) for row in (full, *rows))
    best = dict(zip(header, rows[0], strict=True))
    assert best == {
        "recipe": "**big-w4a6**", "product": "int8", "bits/weight": "5.00", "active bits": "4.00",
        "multiplications": "1.000",
        "accuracy": "55.0%", "color": "12", "perplexity": "2.000", "KL": "0.00200",
        "KL of the seeds": "0.00100-0.00300", "fit s": "3.5", "wins at": "bytes, active bytes, multiplications",
    }  # fmt: skip
    assert [row[-1] for row in rows[1:]] == ["bytes", ""]
    assert full[:1] + full[5:9] == ["full precision", "90.0%", "100", "1.250", "0.00000"]
    assert "Groups with a fall-back, of the worst seed: lost-w4a6 2." in text
    assert "(league/outlier-w4a6.png)" in text
    assert "w4a4" not in text


def test_winners_are_the_steps_of_the_plots(tables):
    _, w4a6, w4a4 = rows_of(tables.winners(RESULT))
    assert w4a6 == [
        "outlier", "w4a6", "4.00 small-w4a6 (0.03000); 5.00 big-w4a6 (0.00200)", "4.00 big-w4a6 (0.00200)",
        "1.000 big-w4a6 (0.00200)",
    ]  # fmt: skip
    assert w4a4[:3] == ["outlier", "w4a4", "4.00 big-w4a4 (0.50000)"]


def test_an_ablation_keeps_its_order(tables):
    result = {"environment": ENVIRONMENT, "models": {"outlier": {"full": FULL, "entries": ENTRIES[:3]}}}
    assert [row[0] for row in rows_of(tables.ablation(result, "outlier"))[2:]] == [
        "**big-w4a6**", "**small-w4a6**", "**lost-w4a6**",
    ]  # fmt: skip


def test_what_was_not_measured_is_said(tables):
    for text in (
        tables.league(RESULT, "plain", "w4a6"),
        tables.league(RESULT, "outlier", "w3a16"),
        tables.ablation(RESULT, "plain"),
    ):
        assert text.strip() == "Not measured yet."


def test_a_table_without_a_result_stays_as_it_is(tables, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = "<!-- table: league outlier w4a6 -->\nas it was\n<!-- end -->\n"
    assert tables.rendered(text) == text
    (tmp_path / "league.json").write_text(json.dumps(RESULT))
    assert "**big-w4a6**" in tables.rendered(text)
    assert tables.rendered(tables.rendered(text)) == tables.rendered(text)


def test_both_sides_of_the_peer_are_a_row_each(tables):
    quality = {"accuracy": 0.5, "perplexity": 2.0, "kl": 0.25}
    row = {
        "model": "plain", "recipe": "rtn", "bits_per_weight": 4.125, "peak_mib": 512.4, "quality": quality,
        "seconds": {"load": 1.0, "oneshot": 2.0}, "cpu_seconds": {"load": 0.5},
    }  # fmt: skip
    theirs, ours = ({**row, "side": side, "versions": {side: "1"}} for side in ("llm-compressor", "qe_dist"))
    other = {**theirs, "model": "outlier"}
    result = {
        "environment": ENVIRONMENT,
        "threads": 1,
        "full_precision": {"plain": FULL},
        "rows": [theirs, ours, other],
    }
    text = tables.peers(result, "plain")
    _, full, first, second = rows_of(text)
    assert full[:5] == ["", "full precision", "16.00", "90.0%", "1.250"]
    assert first == ["llm-compressor", "rtn", "4.12", "50.0%", "2.000", "0.25000", "3.0", "0.5", "512"]
    assert second[0] == "qe_dist"
    assert "the peer has llm-compressor 1." in text


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


def test_versions_of_transformers(tables):
    cases = {
        "5.16.1": {"passed": 3, "skipped": 1, "failed": [], "seconds": 2.0},
        "5.18.0": {"passed": 2, "skipped": 0, "failed": ["test_it"], "seconds": 2.0},
    }
    result = {"environment": ENVIRONMENT, "cases": cases}
    assert rows_of(tables.transformers_versions(result))[1:] == [
        ["5.16.1", "3", "1", "none"], ["5.18.0", "2", "0", "test_it"],
    ]  # fmt: skip


def test_code_is_quoted_as_it_is(tables):
    text = "<!-- file: tests/core/test_errors.py -->\n<!-- end -->"
    assert (ROOT / "tests/core/test_errors.py").read_text() in tables.rendered(text)
