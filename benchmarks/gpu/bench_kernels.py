"""Checks every kernel on this GPU, then measures the linears of Qwen2-VL beside torch, peers and floors.

    python benchmarks/gpu/bench_kernels.py                writes benchmarks/results/kernels_cuda.json
    python benchmarks/gpu/bench_kernels.py --check-only   only the checks
    python benchmarks/gpu/bench_kernels.py --cpu-check    the checks at tiny sizes, interpreted: no GPU is needed

Seconds are those of one call within a CUDA graph (kernel_bench/timing.py). `linear` is the fused kernel alone; `whole`
is all that a quantized linear launches: rounding of the tokens, down projections and routing, linear; `unfused` is the
same with the branches as torch products. The floor of a call is its bytes at the bandwidth of a copy or its products at
the rate of torch's largest ones, whichever takes longer, both measured here; of the experts it counts those that the
tokens chose.
"""

import argparse
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__" and "--cpu-check" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("kernels", "pipelines", ".")]

import torch  # noqa: E402
from kernel_bench.cases import FORMATS, MODELS  # noqa: E402
from kernel_bench.check import Found, checks, sanitized  # noqa: E402
from kernel_bench.measure import Bench, write  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


def checked(device: torch.device, seed: int, small: bool) -> list[Found]:
    """All checks, and a line for each that failed."""
    found = list(checks(device, seed, small))
    for one in found:
        if not one.passed:
            print(f"FAILED {one.name}: {one.error:.3g} times the error that is allowed; {one.detail}")
    worst = max(found, key=lambda one: one.error)
    passed = sum(one.passed for one in found)
    print(f"seed {seed}: {passed} of {len(found)} checks passed; worst {worst.error:.3f}: {worst.name}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check-only", action="store_true", help="measure nothing")
    parser.add_argument("--cpu-check", action="store_true", help="the checks at tiny sizes, in Triton's interpreter")
    parser.add_argument("--small", action="store_true", help="the checks at tiny sizes")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of all inputs; new ones every time")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--minutes", type=float, default=30.0, help="after which nothing more is measured")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels_cuda.json")
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    device = torch.device("cpu") if given.cpu_check else torch.device("cuda", torch.cuda.current_device())
    found = checked(device, given.seed, given.small or given.cpu_check)
    if not all(one.passed for one in found):
        return 1
    if given.check_only or given.cpu_check:
        return 0
    said = sanitized([str(Path(__file__).resolve()), "--check-only", "--small", "--seed", str(given.seed)])
    bench = Bench(device, given.seed, deadline, given.tokens)
    for model in given.models:
        for layer in MODELS[model]:
            bench.layer(model, layer, [FORMATS[name] for name in given.formats])
            checks_made = {"seed": given.seed, "passed": len(found), "worst": max(f.error for f in found)}
            write(given.out, bench.result() | {"checks": checks_made, "compute-sanitizer": said})
    for target in bench.result()["targets"]:
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
