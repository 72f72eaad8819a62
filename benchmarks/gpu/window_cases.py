"""The cases of window.py, each a process that prints what it found as JSON on its last line.

    python benchmarks/gpu/window_cases.py rates
    python benchmarks/gpu/window_cases.py layers:72B:w4a16g128:shared:1,16

compile:I/N                             all kernels of the models below, the I-th of N shares
rates                                   of copies and of products, and the clocks
hazard:TILE, unfinished:TILE            10^4 random tokens against exact sums, with and without the wait for products
checks:SEED                             every kernel against its reference
layers:MODEL:FORMAT:REPAIR:TOKENS       seconds of every linear, beside torch's
tune:FORMAT:TOKENS                      the fastest tiles
stack:TOKENS                            the linears of two blocks as one CUDA graph, beside bf16
counters                                of Nsight Compute, where it is installed and may read them
generate                                a step of a whole model in transformers
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), *(str(ROOT / part) for part in ("kernels", "pipelines", "."))]

import torch  # noqa: E402
from kernel_bench.cases import FORMATS, MODELS, REPAIRS, Layer, Problem, Random  # noqa: E402
from kernel_bench.check import checks, device_for  # noqa: E402
from kernel_bench.measure import Bench  # noqa: E402
from kernel_bench.timing import copies, rates, seconds  # noqa: E402
from qe_kernels.branches import Branch, pack_up  # noqa: E402
from qe_kernels.dispatch import written_table  # noqa: E402
from qe_kernels.layout import order_for, pack_weight  # noqa: E402
from qe_kernels.linear import Config, linear  # noqa: E402
from qe_kernels.plans import DownPlan, LinearPlan, QuantizePlan  # noqa: E402
from qe_kernels.workspaces import workspace_of  # noqa: E402
from torch import Tensor  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TINY = (Layer("tiny", 96, 256),)
INPUTS = 10_000 if GPU else 20
"""Random tokens for each tile: a fault that depends on timing is rare."""


def layers_of(model: str) -> tuple[Layer, ...]:
    return TINY if model == "tiny" else MODELS[model]


def served(problem: Problem, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A linear with all that belongs to its input, as an engine calls it."""
    f, device, columns = problem.format, device_for(DEVICE), problem.weight.columns
    factors = problem.shared_down, problem.expert_down
    repaired = factors != (None, None)
    quantize = QuantizePlan(columns, bits=f.act_bits, outliers=f.outliers, int8=f.int8, with_x=repaired)
    route = None if problem.router is None else DownPlan(device, columns, None, None, problem.router)
    down = DownPlan(device, columns, *factors) if repaired else None
    z = [None if a is None else torch.empty(1, *a[0].shape[:-1], dtype=dtype, device=DEVICE) for a in factors]
    plan = LinearPlan(device, problem.weight, problem.branches(*z), dtype)

    def call(x: Tensor) -> Tensor:
        expert = None if route is None else route(x, x).expert[0]
        made = quantize(x, None, expert)
        found = None if down is None else down(made.x, None, expert)
        zs = [] if found is None else [one for one in (found.shared_z, found.expert_z) if one is not None]
        return plan(made.base, made.token_scale, zs, expert, problem.bias)

    return call


def compiled(share: str) -> dict[str, Any]:
    """The first call of a plan compiles it for every number of tokens."""
    index, count = (int(part) for part in share.split("/"))
    draw, start = Random(0, DEVICE), time.monotonic()
    every = [
        (layer, form, repair)
        for model in (("72B", "7B") if GPU else ("tiny",))
        for layer in layers_of(model)
        for form in FORMATS.values()
        for repair in REPAIRS.values()
    ]
    for layer, form, repair in every[index::count]:
        problem = draw.repaired(draw.problem(layer, form), repair)
        served(problem, torch.bfloat16)(draw.tokens(1, layer.inputs))
    return {"linears": len(every[index::count]), "seconds": time.monotonic() - start}


def machine() -> dict[str, Any]:
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    said = None
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "nvidia-smi": said}
    return found | {"rates": asdict(rates(DEVICE))}


def hazard(tile: str, unfinished: bool = False) -> dict[str, Any]:
    """Tokens whose result is not the exact one. All values are small integers, so that every sum is exact."""
    if unfinished and GPU:
        from tests.kernels.aot import leave_products_unfinished

        leave_products_unfinished()
    outputs, tokens, depth = (int(part) for part in tile.split("x"))
    large = outputs * tokens > 128 * 64
    rows, columns, found = max(256, outputs), 2048 if GPU else 256, {}
    draw, order = Random(0, DEVICE), order_for(DEVICE)
    words = draw.words(rows, columns, 4)
    for name, group, int8 in (("a16", None, False), ("a16g128", 128, False), ("a8", None, True)):
        if int8 and large and outputs * depth < 256 * 128 and outputs == 256:
            continue  # this tile is for 16 bits
        scale = torch.ones(rows, columns // (group or columns), device=DEVICE).bfloat16()
        weight = pack_weight(words.clone(), 4, scale, columns, order, int8, group)
        up = pack_up((draw.integers(-2, 3, rows, 128).to(torch.int8), torch.ones(rows, device=DEVICE)), order)
        config = Config(
            outputs, tokens, depth, warps=8 if outputs > 64 else 4, stages=3 if large else 4,
            scale_weights=large and not int8,
        )  # fmt: skip
        found[name] = sum(_wrong(draw, weight, up, config, tokens) for _ in range(-(-INPUTS // tokens)))
    return {"tokens": INPUTS, "wrong": found}


def _wrong(draw: Random, weight: Any, up: Any, config: Config, tokens: int) -> int:
    from qe_kernels.linear import linear_reference

    base = draw.integers(-3, 4, tokens, weight.columns).to(torch.int8 if weight.int8 else torch.bfloat16)
    token_scale = torch.ones(tokens, device=DEVICE) if weight.int8 else None
    branches = [Branch(draw.integers(-3, 4, tokens, 128).bfloat16(), up)]
    given = (base, token_scale, weight, branches, None, None)
    y = linear(*given, out_dtype=torch.bfloat16, config=config, workspace=workspace_of(DEVICE))
    exact = linear_reference(*given, out_dtype=torch.float64, compute=torch.float64)
    allowed = (
        2.0**-8 * exact.abs() if GPU else 2.0**-7 * exact.abs()
    )  # of rounding to bf16, which Triton's interpreter cuts
    return int(((y.double() - exact).abs() > allowed).any(dim=1).sum())


def checked(seed: str) -> dict[str, Any]:
    found = list(checks(DEVICE, int(seed), small=not GPU))
    failed = [asdict(one) for one in found if not one.passed]
    return {"passed": len(found) - len(failed), "failed": failed, "worst": max(one.error for one in found)}


def timed(model: str, form: str, repair: str, tokens: str) -> dict[str, Any]:
    bench = Bench(DEVICE, 0, time.monotonic() + 3600, [int(count) for count in tokens.split(",")])
    for layer in layers_of(model):
        if repair == "bare":
            bench._torch(model, layer)
        count = copies(layer.outputs * layer.inputs * FORMATS[form].bits // 8, DEVICE)
        bare = [bench.draw.problem(layer, FORMATS[form]) for _ in range(count)]
        bench._ours(model, layer.name, REPAIRS[repair], [bench.draw.repaired(one, REPAIRS[repair]) for one in bare])
    return {"rows": [asdict(row) for row in bench.rows]}


def tuned(form: str, tokens: str) -> dict[str, Any]:
    import tune

    work = [(layer, FORMATS[form]) for layer in (MODELS["72B"] if GPU else TINY)]
    tables = list(tune.tables(DEVICE, 0, time.monotonic() + 40, work, [int(tokens)]))
    return {"linears": written_table(tables[-1]) if tables else {}}


@torch.inference_mode()
def stacked(tokens: str) -> dict[str, Any]:
    """Two blocks of 72B, linear after linear, as one CUDA graph; each reads what has its width."""
    draw, found = Random(0, DEVICE), {}
    shapes = (MODELS["72B"] if GPU else TINY) * 2
    inputs = {layer.inputs: draw.tokens(int(tokens), layer.inputs) for layer in shapes}
    plain = [draw.normal(layer.outputs, layer.inputs) for layer in shapes]
    found["bf16"] = seconds([lambda: [inputs[w.shape[1]] @ w.T for w in plain]], DEVICE)
    del plain
    for form in ("w4a16g128", "w4a8"):
        for repair in REPAIRS.values():
            problems = [draw.repaired(draw.problem(layer, FORMATS[form]), repair) for layer in shapes]
            calls = [(served(one, torch.bfloat16), inputs[one.weight.columns]) for one in problems]
            found[f"{form} {repair.name}"] = seconds([lambda calls=calls: [call(x) for call, x in calls]], DEVICE)
    return found


def counters() -> dict[str, Any]:
    program = shutil.which("ncu")
    if program is None:
        return {"ncu": "not installed"}
    metrics = "smsp__issue_active.avg.pct_of_peak_sustained_active,dram__throughput.avg.pct_of_peak_sustained_elapsed"
    command = [program, "--metrics", metrics, "--kernel-name", "regex:_linear|_down", "--launch-count", "8", "--csv"]
    command += [sys.executable, __file__, "stack:16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"ncu": (done.stdout + done.stderr)[-4000:]}


def generated() -> dict[str, Any]:
    import generate

    shape, names = (generate.WIDE, generate.TIMED[:2]) if GPU else (generate.TINY, ("rtn-w4a16g32",))
    return generate.speed(shape, (1, 16, 64) if GPU else (1,), names, DEVICE)


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "compile": compiled,
    "rates": machine,
    "hazard": hazard,
    "unfinished": lambda tile: hazard(tile, unfinished=True),
    "checks": checked,
    "layers": timed,
    "tune": tuned,
    "stack": stacked,
    "counters": counters,
    "generate": generated,
}


def main() -> None:
    name, *arguments = sys.argv[1].split(":")
    print(json.dumps(CASES[name](*arguments)))


if __name__ == "__main__":
    main()
