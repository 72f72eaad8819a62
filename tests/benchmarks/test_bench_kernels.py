"""benchmarks/gpu/bench_kernels.py and tune.py work, as far as a machine without a GPU can show."""

import importlib
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.usefixtures("gpu_scripts")
CPU = torch.device("cpu")


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_the_kernels_pass_the_checks_of_the_benchmark() -> None:
    found = module("bench_kernels").checked(CPU, seed=1, small=True)
    assert [one for one in found if not one.passed] == []
    assert {one.name.split()[0] for one in found} == {"layout", "quantize", "down", "linear"}


def problem_of(name: str, outputs: int = 130):
    cases = module("kernel_bench.cases")
    draw = cases.Random(0, CPU)
    bare = draw.problem(cases.Layer("tiny", outputs, 256), replace(cases.FORMATS["w4a8"]))
    return draw, draw.repaired(bare, cases.REPAIRS[name])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: y.index_fill(1, torch.tensor([7]), 0.0), None),
        (lambda y: y.index_fill(1, torch.tensor([129]), float("nan")), None),
        (lambda y: y + 0.02 * y.square().mean().sqrt(), None),
        (lambda y: y + torch.rand(1), "a race"),
    ],
    ids=["a column is missing", "a column was not written", "all is off by 2 %", "runs differ"],
)
def test_a_wrong_kernel_does_not_pass(wrong, message, monkeypatch: pytest.MonkeyPatch) -> None:
    check = module("kernel_bench.check")
    right = check.linear
    draw, problem = problem_of("experts")
    config = check.choose(check.INTERPRETER, problem.weight, 5)
    assert check.check_linear(draw, problem, 5, config).passed
    monkeypatch.setattr(check, "linear", lambda *given, **how: wrong(right(*given, **how)))
    if message is None:
        assert not check.check_linear(draw, problem, 5, config).passed
    else:
        with pytest.raises(AssertionError, match=message):
            check.check_linear(draw, problem, 5, config)


@pytest.mark.parametrize(("program", "said"), [("true", "clean"), ("false", "failed: "), ("sleep", "not done")])
def test_what_compute_sanitizer_says_is_kept(program, said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check, stand_in = module("kernel_bench.check"), tmp_path / program
    stand_in.write_text(f"#!/bin/sh\nexec {program} {60 if program == 'sleep' else ''}\n", encoding="utf-8")
    stand_in.chmod(0o755)
    monkeypatch.setattr(check.shutil, "which", lambda name: str(stand_in))
    found = check.sanitized(["kernels.py"], minutes=0.002 if program == "sleep" else 1.0)
    assert {tool: text.startswith(said) for tool, text in found.items()} == {"memcheck": True, "racecheck": True}


def test_without_compute_sanitizer_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    check = module("kernel_bench.check")
    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    assert check.sanitized([]) == {}


def test_unwritten_memory_is_poisoned() -> None:
    with module("kernel_bench.check").poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.ones(1).new_empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_rows_of_a_problem_are_those_of_the_whole() -> None:
    cases, linear = module("kernel_bench.cases"), module("qe_kernels.linear").linear_reference
    draw, problem = problem_of("experts", outputs=64 * 6 + 5)
    rows, part = cases.some_rows(problem)
    assert rows == [*range(192), *range(384, 389)]
    prepared = module("kernel_bench.calls").prepare(problem, draw.tokens(3, 256))
    y = linear(*prepared[:2], problem.weight, *prepared[2:], out_dtype=torch.float64, compute=torch.float64)
    ups = (part.shared_up, part.expert_up)
    branches = [replace(b, up=u) for b, u in zip(prepared[2], ups, strict=True)]
    few = linear(*prepared[:2], part.weight, branches, prepared[3], out_dtype=torch.float64, compute=torch.float64)
    assert torch.allclose(y[:, rows], few)


@pytest.mark.parametrize("repair", ["bare", "shared", "experts"])
def test_work_is_what_is_read_written_and_multiplied(repair: str) -> None:
    calls = module("kernel_bench.calls")
    draw, problem = problem_of(repair)
    m, n, k = 4, 130, 256
    prepared = calls.prepare(problem, draw.tokens(m, k))
    shared, rank, experts = {"bare": (0, 0, 0), "shared": (384, 0, 0), "experts": (32, 32, 8)}[repair]
    chosen = min(3, experts)
    weights = 192 * k // 2 + 2 * n  # rows are padded to 64
    bits = 4 if repair == "shared" else 8
    columns = -(-shared // 128) * 128
    up = columns * 192 * bits / 8 + 2 * n * (shared > 0) + chosen * (rank * 192 + 2 * n)
    down = shared * k * bits / 8 + 2 * shared + chosen * rank * (k + 2) + 4 * experts * k
    linear, whole = calls.work_of_linear(problem, prepared, chosen), calls.work_of_whole(problem, m, chosen)
    assert linear.bytes == weights + up + m * k + 2 * m * (shared + rank) + 2 * m * n
    assert whole.bytes == weights + up + down + 2 * m * k + 2 * m * n
    assert linear.flop8 == whole.flop8 == 2 * m * n * k
    assert linear.flop == 2 * m * n * (k + shared + rank)
    assert whole.flop == linear.flop + 2 * m * k * (shared + rank + experts)


def test_a_floor_is_the_slower_of_memory_and_tensor_cores() -> None:
    rates = module("kernel_bench.timing").Rates(bytes=10.0, flop16=100.0, flop8=200.0)
    work = module("kernel_bench.calls").Work
    assert work(bytes=50.0, flop=100.0).floor(rates) == 5.0
    assert work(bytes=1.0, flop=300.0, flop8=200.0).floor(rates) == 2.0


def test_every_part_of_a_layer_is_measured() -> None:
    measure, cases = module("kernel_bench.measure"), module("kernel_bench.cases")
    bench = measure.Bench(CPU, 0, time.monotonic() + 600, tokens=(1, 3))
    bench.layer("72B", cases.Layer("qkv", 96, 256), list(cases.FORMATS.values()))
    result = bench.result()
    ours = {(f, r, p) for f in cases.FORMATS for r in cases.REPAIRS for p in ("linear", "whole")}
    unfused = {(f, r, "unfused") for f in cases.FORMATS for r in ("shared", "experts")}
    found = {(row["format"], row["repair"], row["part"]) for row in result["rows"] if row["tokens"] == 3}
    assert found == ours | unfused | {("bf16", "bare", "torch")}
    assert all(said.startswith("did not run: ModuleNotFoundError") for said in result["peers"].values())
    assert json.loads(json.dumps(result)) == result


def test_an_unfused_layer_computes_the_same() -> None:
    calls, cases = module("kernel_bench.calls"), module("kernel_bench.cases")
    draw, bare = problem_of("bare")
    problem = draw.repaired(bare, replace(cases.REPAIRS["experts"], bits=16))
    x = draw.tokens(9, 256)
    a, b = calls.whole(problem, x).float(), calls.unfused(problem, x).float()
    assert (a - b).square().mean() <= 1e-4 * a.square().mean()


def test_after_the_deadline_nothing_is_measured() -> None:
    measure, cases = module("kernel_bench.measure"), module("kernel_bench.cases")
    bench = measure.Bench(CPU, 0, time.monotonic() - 1, tokens=(1,))
    bench.layer("72B", cases.Layer("qkv", 96, 256), [cases.FORMATS["w4a8"]])
    assert bench.rows == []


def rows(seconds: dict[str, float]) -> list[dict]:
    """Of a model on which every layer takes so many seconds, by format; `bare` for ours without branches."""
    targets = module("kernel_bench.targets")
    measure = module("kernel_bench.measure")
    made = []
    for layer in targets.LAYERS:
        for tokens in (*targets.DECODE, *targets.MIDDLE, targets.PREFILL):
            made.append(measure.Row("72B", layer, tokens, "bf16", "bare", "torch", seconds["bf16"], 1.0, 0, 0))
            for format in (targets.GROUPED, targets.CHANNEL):
                for repair in ("bare", "experts"):
                    taken = seconds[format] if repair == "experts" else seconds["bare"]
                    made.append(measure.Row("72B", layer, tokens, format, repair, "whole", taken, 1.0, 0, 0))
    return [asdict(row) for row in made]


def test_targets_are_the_worst_of_what_counts() -> None:
    targets = module("kernel_bench.targets").targets
    fast = targets(rows({"bf16": 8.0, "w4a16g128": 2.0, "w4a8": 1.0, "bare": 1.0}))
    by_name = {target.name: target for target in fast}
    assert by_name["w4a16g128, M up to 16: of the bandwidth on gate_up and down"].found == 0.5
    assert by_name["w4a16g128, M up to 16: time of the block over that without branches"].found == 2.0
    assert by_name["w4a16g128, M up to 16: the block, times as fast as bf16"].found == 4.0
    assert by_name["w4a8, M = 4096: the block, times as fast as bf16"].found == 8.0
    assert [t.name for t in fast if not t.met] == [
        "w4a16g128, M up to 16: of the bandwidth on gate_up and down",
        "w4a16g128, M up to 16: of the bandwidth on qkv and o",
        "w4a16g128, M up to 16: time of the block over that without branches",
    ]


def test_what_was_not_measured_meets_and_misses_no_target() -> None:
    assert {target.met for target in module("kernel_bench.targets").targets([])} == {None}


def test_a_table_is_tuned_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune, dispatch = module("tune"), module("qe_kernels.dispatch")
    command = [
        "tune.py",
        "--cpu-check",
        "--minutes",
        "0",
        "--formats",
        "w4a8",
        "--buckets",
        "1",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", command)
    tune.main()
    content = json.loads((tmp_path / "interpreter.json").read_text(encoding="utf-8"))
    config = dispatch.read_table(content)["w4a8 96x256"][1]
    assert config is not None
    monkeypatch.setattr(sys, "argv", [*command[:-3], "16", *command[-2:]])
    tune.main()
    content = json.loads((tmp_path / "interpreter.json").read_text(encoding="utf-8"))
    assert dispatch.read_table(content)["w4a8 96x256"].keys() == {1, 16}


def test_wrong_tiles_are_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    tune, linear = module("tune"), module("qe_kernels.linear")
    draw, problem = problem_of("bare")
    bad, good = linear.Config(64, 16, 64), linear.Config(64, 16, 128)
    monkeypatch.setattr(tune, "candidates", lambda *_: iter((bad, good)))
    right = tune.call
    monkeypatch.setattr(tune, "call", lambda p, g, dtype, config: right(p, g, dtype, good) * (config != bad))
    timed = tune.tune([problem], draw.tokens(2, 256), tune.device_for(CPU), time.monotonic() + 600)
    assert [one.config for one in timed] == [good]


@pytest.mark.parametrize("format", ["w4a16g128", "w4a8"])
@pytest.mark.parametrize("tokens", [1, 64, 256, 4096])
def test_candidates_begin_with_the_rule_and_are_many(format: str, tokens: int) -> None:
    tune, cases = module("tune"), module("kernel_bench.cases")
    draw = cases.Random(0, CPU)
    problem = draw.problem(cases.Layer("tiny", 64, 512), cases.FORMATS[format])
    device = replace(tune.device_for(CPU), capability=(9, 0))
    found = list(tune.candidates(device, problem, tokens))
    assert found[0] == tune.heuristic(device, problem.weight, tokens)
    assert len(found) == len(set(found)) > 20
    assert (None in found) == (tokens >= 256 or found[0] is None)
