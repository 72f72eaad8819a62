"""Checks every kernel on this GPU, then measures the linears of Qwen2-VL beside torch, peers and floors.

    python benchmarks/gpu/kernels.py                 writes benchmarks/results/kernels_cuda.json
    python benchmarks/gpu/kernels.py --check-only    only the checks
    python benchmarks/gpu/kernels.py --cpu-check     the checks at tiny sizes in Triton's interpreter: no GPU is needed

Seconds are those of one call within a CUDA graph (timing.py). `linear` is the fused kernel alone; `whole` is all that a
quantized linear launches: rounding of the tokens, down projections and routing, linear; `unfused` the same with the
branches as torch products. The floor of a call is its bytes at the bandwidth of a copy or its products at the rate of
torch's largest ones, whichever takes longer, both measured here; of the experts it counts those that the tokens chose.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "--cpu-check" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("benchmarks/gpu", "kernels", "pipelines", ".")]

import torch  # noqa: E402
from calls import Work, linear, prepare, unfused, whole, work_of_linear, work_of_torch, work_of_whole  # noqa: E402
from cases import FORMATS, MODELS, REPAIRS, Format, Layer, Problem, Random, Repair, some_rows  # noqa: E402
from check import Found, checks, error, sanitized  # noqa: E402
from peers import PEERS  # noqa: E402
from qe_kernels import Branch  # noqa: E402
from qe_kernels.dispatch import choose, device_of  # noqa: E402
from qe_kernels.linear import linear_reference  # noqa: E402
from targets import targets  # noqa: E402
from timing import copies, rates, seconds  # noqa: E402
from torch import Tensor  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
PEER_FORMAT = "w4a16g128"


@dataclass(frozen=True)
class Row:
    """One measurement."""

    model: str
    layer: str
    tokens: int
    format: str
    repair: str
    part: str
    """linear, whole, unfused, torch, or the name of a peer."""
    seconds: float
    floor: float
    """Seconds."""
    bytes: float
    flop: float
    tiles: str = ""

    def __str__(self) -> str:
        return (
            f"{self.model:4}{self.layer:8}{self.tokens:5}  {self.format:10}{self.repair:8}{self.part:9}"
            f"{self.seconds * 1e6:10.1f} us, floor {self.floor * 1e6:9.1f} us ({self.floor / self.seconds:4.0%}): "
            f"{self.bytes / 1e6:8.1f} MB, {self.flop / 1e9:9.1f} GFLOP"
        )


class Bench:
    """Measurements on one device, until the time is up."""

    def __init__(self, device: torch.device, seed: int, deadline: float, tokens: Sequence[int]) -> None:
        self.device, self.deadline, self.tokens = device, deadline, tokens
        self.draw, self.rates = Random(seed, device), rates(device)
        self.rows: list[Row] = []
        self.peers = dict.fromkeys(PEERS, "not run")

    def layer(self, model: str, layer: Layer, formats: Sequence[Format]) -> None:
        """torch, every format with every repair, and the peers."""
        self._torch(model, layer)
        for format in formats:
            count = copies(layer.outputs * layer.inputs * format.bits // 8, self.device)
            bare = [self.draw.problem(layer, format) for _ in range(count)]
            for repair in REPAIRS.values():
                self._ours(model, layer.name, repair, [self.draw.repaired(problem, repair) for problem in bare])
            for name in PEERS if format.name == PEER_FORMAT else ():
                self._peer(name, model, layer.name, bare)

    def _torch(self, model: str, layer: Layer) -> None:
        size = layer.outputs, layer.inputs
        count = copies(2 * layer.outputs * layer.inputs, self.device)
        weights = [self.draw.normal(*size) * layer.inputs**-0.5 for _ in range(count)]
        for tokens in self.tokens:
            x = self.draw.tokens(tokens, layer.inputs)
            calls = [lambda w=w, x=x: x @ w.T for w in weights]
            self._add(model, layer.name, tokens, "bf16", "bare", "torch", calls, work_of_torch(*size, tokens))

    def _ours(self, model: str, layer: str, repair: Repair, problems: Sequence[Problem]) -> None:
        first, format = problems[0], problems[0].format.name
        wide = [self.draw.repaired(problem, replace(repair, bits=16)) for problem in problems]
        for tokens in self.tokens:
            if time.monotonic() > self.deadline:
                return
            x = self.draw.tokens(tokens, first.weight.columns)
            verify(first, x)
            prepared = [prepare(problem, x) for problem in problems]
            expert = prepared[0][3]
            chosen = 0 if expert is None else expert.unique().numel()
            device = device_of(self.device)
            tiles = "" if device is None else str(choose(device, first.weight, tokens))
            both = list(zip(problems, prepared, strict=True))
            least = work_of_whole(first, tokens, chosen)
            calls = [lambda p=p, g=g, x=x: linear(p, g, x.dtype) for p, g in both]
            named = (model, layer, tokens, format, repair.name)
            self._add(*named, "linear", calls, work_of_linear(first, prepared[0], chosen), tiles)
            self._add(*named, "whole", [lambda p=p, x=x: whole(p, x) for p in problems], least, tiles)
            if repair.name != "bare":
                self._add(*named, "unfused", [lambda p=p, x=x: unfused(p, x) for p in wide], least)

    def _peer(self, name: str, model: str, layer: str, bare: Sequence[Problem]) -> None:
        """A peer's failure is a result; it ends the peer and nothing else."""
        try:
            products = [PEERS[name](problem) for problem in bare]
            for tokens in self.tokens:
                x = self.draw.tokens(tokens, bare[0].weight.columns)
                rows, part = some_rows(bare[0])
                exact = linear_reference(x, None, part.weight, out_dtype=torch.float64, compute=torch.float64)
                assert error(products[0](x)[:, rows], exact) <= 4.0, "its result is wrong"
                calls = [lambda p=p, x=x: p(x) for p in products]
                least = work_of_whole(bare[0], tokens, 0)
                self._add(model, layer, tokens, PEER_FORMAT, "bare", name, calls, least)
            self.peers[name] = "ran"
        except Exception as failure:
            self.peers[name] = f"did not run: {failure!r}"

    def _add(
        self, model: str, layer: str, tokens: int, format: str, repair: str, part: str,
        calls: Sequence[Callable[[], Tensor]], least: Work, tiles: str = "",
    ) -> None:  # fmt: skip
        if time.monotonic() <= self.deadline:
            floor = least.floor(self.rates)
            taken = seconds(calls, self.device)
            row = Row(model, layer, tokens, format, repair, part, taken, floor, least.bytes, least.flop, tiles)
            self.rows.append(row)
            print(row, flush=True)

    def result(self) -> dict[str, Any]:
        rows = [asdict(row) for row in self.rows]
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "versions": {name: version(name) for name in ("torch", "triton")},
            "rates": asdict(self.rates),
            "peers": self.peers,
            "rows": rows,
            "targets": [asdict(target) | {"met": target.met} for target in targets(rows)],
        }


def verify(problem: Problem, x: Tensor) -> None:
    """AssertionError where the linear differs from the reference on a few hundred outputs."""
    prepared = prepare(problem, x)
    rows, part = some_rows(problem)
    ups = [up for up in (part.shared_up, part.expert_up) if up is not None]
    branches = [Branch(branch.z, *up) for branch, up in zip(prepared[2], ups, strict=True)]
    exact = linear_reference(
        *prepared[:2], part.weight, branches, prepared[3], part.bias, out_dtype=torch.float64, compute=torch.float64
    )
    wrong = error(linear(problem, prepared, x.dtype)[:, rows], exact)
    assert wrong <= 1.0, f"{problem.format.name}, {len(x)} tokens: {wrong:.2f} times the error that is allowed"


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


def write(path: Path, content: dict[str, Any]) -> None:
    """With the environment, where the project is installed; the numbers alone where only its kernels are."""
    try:
        from qe_pipelines.results import write_result
    except ImportError:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    else:
        write_result(path, content)


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
