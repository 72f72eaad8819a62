"""Measures tiles for every linear and number of tokens on this GPU, and writes the table that dispatch reads.

    python benchmarks/gpu/tune.py --minutes 10       writes kernels/qe_kernels/tables/DEVICE.json

A choice is made for the branches of routed experts, and holds for the others. What a table has already is measured
again. Tiles whose result is wrong, or which do not fit into the device, are never chosen. The table is written after
every bucket, so a run that is cut off keeps what it found.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

if __name__ == "__main__" and "--cpu-check" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("kernels", "pipelines", ".")]

import torch  # noqa: E402
from kernel_bench.calls import Prepared, prepare, some_outputs  # noqa: E402
from kernel_bench.cases import FORMATS, MODELS, REPAIRS, Format, Layer, Problem, Random  # noqa: E402
from kernel_bench.check import device_for, error  # noqa: E402
from kernel_bench.measure import write  # noqa: E402
from kernel_bench.timing import copies, seconds  # noqa: E402
from qe_kernels.dense import linear_on_dense_weight  # noqa: E402
from qe_kernels.dispatch import BUCKETS, Device, Table, file_name, heuristic, key_of, read_table, written_table  # noqa: E402
from qe_kernels.linear import Config, linear  # noqa: E402
from qe_kernels.workspaces import workspace_of  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

TABLES = ROOT / "kernels" / "qe_kernels" / "tables"
DENSE_FROM = 256
"""Tokens from which dequantizing once is a candidate."""


@dataclass(frozen=True)
class Timed:
    config: Config | None
    seconds: float


def candidates(device: Device, problem: Problem, tokens: int) -> Iterator[Config | None]:
    """The heuristic's choice first, then dequantized once (None), then tiles around it in random order, for the time
    may not be enough for all."""
    guess = heuristic(device, problem.weight, tokens)
    yield guess
    if tokens >= DENSE_FROM and guess is not None:
        yield None
    others = [config for config in tiles(problem, tokens) if config != guess]
    random.Random(tokens).shuffle(others)
    yield from others


def tiles(problem: Problem, tokens: int) -> Iterator[Config]:
    """All that the kernel can run and that are not hopeless."""
    group, int8, narrow = problem.weight.group_size, problem.format.int8, tokens <= 64
    widths = (max(16, tokens),) if narrow else (64, 128, 256)
    splits = (1, 2, 4, 8, 16) if narrow else (1, 2)
    scaled = (False,) if int8 or group is None or tokens <= 32 else (False, True)
    for outputs, width, depth, split, warps, stages, scale_weights in product(
        (64, 128, 256), widths, (64, 128, 256), splits, (4, 8), (3, 4, 5), scaled
    ):
        large = outputs * width > 128 * 64
        if large and (depth > 128 or stages > 4 or split > 1 or warps < 8):
            continue
        if group is not None and group % depth and (int8 or not scale_weights):
            continue
        yield Config(outputs, width, depth, split, warps, stages, scale_weights=scale_weights)


def call(problem: Problem, prepared: Prepared, dtype: torch.dtype, config: Config | None) -> Tensor:
    base, token_scale, branches, expert = prepared
    arguments = (base, token_scale, problem.weight, branches, expert, problem.bias)
    if config is None:
        return linear_on_dense_weight(*arguments, out_dtype=dtype)
    return linear(*arguments, out_dtype=dtype, config=config, workspace=workspace_of(base.device))


def right(problem: Problem, prepared: Prepared) -> Callable[[Tensor], bool]:
    """Whether a result is, judged by a few hundred outputs."""
    rows, exact = some_outputs(problem, prepared)
    return lambda y: error(y[:, rows], exact) <= 1.0


def tune(problems: Sequence[Problem], x: Tensor, device: Device, deadline: float) -> list[Timed]:
    """Those that are right and fit, the fastest first; at least the heuristic's is tried."""
    prepared = [prepare(problem, x) for problem in problems]
    is_right, found = right(problems[0], prepared[0]), []
    for config in candidates(device, problems[0], len(x)):
        if found and time.monotonic() > deadline:
            break
        calls = [lambda p=p, g=g, c=config: call(p, g, x.dtype, c) for p, g in zip(problems, prepared, strict=True)]
        try:
            if is_right(calls[0]()):
                found.append(Timed(config, seconds(calls, x.device, least=0.005)))
        except (OutOfResources, ValueError):  # of shared memory; of the workspace
            continue
    return sorted(found, key=lambda timed: timed.seconds)


def tables(
    device: torch.device, seed: int, deadline: float, work: Sequence[tuple[Layer, Format]], buckets: Sequence[int]
) -> Iterator[Table]:
    """The table as it grows, bucket by bucket. The time that is left is shared evenly by what is left to do."""
    draw, table = Random(seed, device), {}
    left = len(work) * len(buckets)
    for layer, format in work:
        count = copies(layer.outputs * layer.inputs * format.bits // 8, device)
        repaired = REPAIRS["experts"]
        problems = [draw.repaired(draw.problem(layer, format), repaired) for _ in range(count)]
        for bucket in buckets:
            now = time.monotonic()
            x = draw.tokens(bucket, layer.inputs)
            timed = tune(problems, x, device_for(device), now + (deadline - now) / left)
            left -= 1
            if timed:
                key = key_of(problems[0].weight)
                table = {**table, key: {**table.get(key, {}), bucket: timed[0].config}}
                print(
                    f"{key} {bucket}: {timed[0].seconds * 1e6:.1f} us, {timed[0].config}, of {len(timed)}", flush=True
                )
                yield table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cpu-check", action="store_true", help="one tiny linear in Triton's interpreter: shows it works"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--buckets", nargs="+", type=int, choices=BUCKETS, default=BUCKETS)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=TABLES)
    given = parser.parse_args()
    device = torch.device("cpu") if given.cpu_check else torch.device("cuda", torch.cuda.current_device())
    shapes = [Layer("tiny", 96, 256)] if given.cpu_check else [layer for m in given.models for layer in MODELS[m]]
    work = [(layer, FORMATS[name]) for layer in shapes for name in given.formats]
    name = device_for(device).name
    path = given.out / file_name(name)
    before = read_table(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    deadline = time.monotonic() + 60 * given.minutes
    for table in tables(device, given.seed, deadline, work, given.buckets):
        merged = {key: {**before.get(key, {}), **table.get(key, {})} for key in {**before, **table}}
        write(path, {"device": name, "linears": written_table(merged)})


if __name__ == "__main__":
    sys.exit(main())
