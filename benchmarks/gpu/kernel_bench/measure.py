"""Measurements of the linears of a model, each beside its floor, and the file that they go to."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from qe_kernels.dispatch import choose, device_of
from torch import Tensor

from kernel_bench.calls import (
    Work,
    linear,
    prepare,
    some_outputs,
    unfused,
    whole,
    work_of_linear,
    work_of_torch,
    work_of_whole,
)  # fmt: skip
from kernel_bench.cases import REPAIRS, Format, Layer, Problem, Random, Repair
from kernel_bench.check import error
from kernel_bench.peers import PEERS
from kernel_bench.targets import targets
from kernel_bench.timing import copies, rates, seconds

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
                rows, exact = some_outputs(bare[0], (x, None, [], None))
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
    rows, exact = some_outputs(problem, prepared)
    wrong = error(linear(problem, prepared, x.dtype)[:, rows], exact)
    assert wrong <= 1.0, f"{problem.format.name}, {len(x)} tokens: {wrong:.2f} times the error that is allowed"


def write(path: Path, content: dict[str, Any]) -> None:
    """With the environment, where the project is installed; the numbers alone where only its kernels are."""
    try:
        from qe_pipelines.results import write_result
    except ImportError:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    else:
        write_result(path, content)
