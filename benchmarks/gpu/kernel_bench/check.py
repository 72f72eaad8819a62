"""Every kernel against its reference on this machine: fresh random inputs, poisoned outputs, each call made twice.

On a GPU the kernels run there; on a CPU they run in Triton's interpreter, at tiny sizes, and show that this file works.
"""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from qe_kernels import order_for, pack_weight, unpack_weight
from qe_kernels.dense import dequantize, dequantize_reference, linear_on_dense_weight
from qe_kernels.dispatch import Device, choose, device_of
from qe_kernels.down import Down, down, down_config, down_reference
from qe_kernels.linear import Config, linear, linear_reference
from qe_kernels.quantize import quantize
from qe_kernels.quantize_reference import quantize_reference
from qe_kernels.workspaces import workspace_of
from torch import Tensor

from kernel_bench.cases import FORMATS, REPAIRS, Format, Layer, Problem, Random

ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Twice the largest relative error of one rounding to the format."""
INTERPRETER = Device("interpreter", (8, 0), processors=2)


@dataclass(frozen=True)
class Found:
    """The outcome of one check."""

    name: str
    error: float
    """In units of what is allowed: at most 1 passes."""
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= 1.0


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated inside holds NaN, or the largest integer, until it is written."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it goes fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def twice(call: Callable[[], Tensor]) -> Tensor:
    """The result, into poisoned memory; AssertionError where a second run has other bits."""
    with poisoned():
        first, second = call(), call()
    assert torch.equal(_bits(first), _bits(second)), "two runs differ: a race"
    return first


def _bits(tensor: Tensor) -> Tensor:
    """NaN equals itself."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def error(found: Tensor, exact: Tensor) -> float:
    """The largest error in units of what the format of `found` and a sum in fp32 allow, infinite where not finite.

    Of a number: one rounding of its own, and 8 of one of typical size for the roundings before the sum. Of all: one.
    """
    if not exact.numel():
        return 0.0
    if not found.isfinite().all():
        return float("inf")
    unit, difference = ROUNDING[found.dtype], (found.double() - exact).abs()
    typical = exact.square().mean().sqrt().clamp_min(1e-30)
    single = (difference / (unit * (exact.abs() + 8 * typical))).max()
    return max(float(single), float(difference.square().mean().sqrt() / (unit * typical)))


def device_for(device: torch.device) -> Device:
    """What the tiles are chosen for; the interpreter stands in for an Ampere GPU."""
    return device_of(device) or INTERPRETER


def prologue(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor | None, list, Tensor | None]:
    """What a linear is called with, by the references: base, token scale, branches, expert."""
    f = problem.format
    made = quantize_reference(x, bits=f.act_bits, outliers=f.outliers, int8=f.int8)
    z = down_reference(x, problem.shared_down, problem.expert_down, problem.router, x)
    expert = None if z.expert is None else z.expert[0]
    return made.base, made.token_scale, problem.branches(z.shared_z, z.expert_z), expert


def check_layout(draw: Random, bits: int, int8: bool, group: int | None) -> Found:
    rows, columns = 130, 384
    words = draw.words(rows, columns, bits)
    scale = draw.normal(rows, columns // group if group else 1)
    weight = pack_weight(words.clone(), bits, scale, columns, order_for(draw.device), int8, group)
    codes, found = unpack_weight(weight)
    again = pack_weight(words.clone(), bits, scale, columns, order_for(draw.device), not int8, group)
    same = torch.equal(codes, unpack_weight(again)[0]) and torch.equal(found, scale)
    dense = twice(lambda: dequantize(weight, draw.dtype))
    wrong = error(dense, dequantize_reference(weight, torch.float64))
    return Found(f"layout w{bits} {'int8' if int8 else '16 bits'} g{group}", wrong if same else float("inf"))


def check_quantize(draw: Random, tokens: int, width: int, format: Format, norm: bool) -> Found:
    """Codes are equal bit by bit; after a norm, whose sum has another order, they may be one step apart. Triton's
    interpreter truncates to bf16, so outliers there may be one bit apart."""
    x = draw.tokens(tokens, width)
    how = {"bits": format.act_bits, "outliers": format.outliers, "int8": format.int8}
    how |= {"norm_weight": draw.normal(width)} if norm else {}
    base = twice(lambda: quantize(x, **how).base)
    wanted = quantize_reference(x, **how).base
    name = f"quantize {format.name}{' norm' if norm else ''} {tokens}x{width}"
    if norm:
        top = 2 ** (format.act_bits - 1) - 1
        allowed = 1.0 if format.int8 else wanted.double().abs().amax(dim=1, keepdim=True) / top
    else:
        allowed = 0.0 if format.int8 or x.is_cuda else 2.0**-7 * wanted.double().abs()
    difference = (base.double() - wanted.double()).abs()
    return Found(name, float(torch.where(difference == 0, 0.0, difference / allowed).max()))


def check_down(draw: Random, problem: Problem, tokens: int, known: bool) -> Found:
    """known: whether the experts of the tokens are given. Else a choice must be as good as the best, up to rounding."""
    x = draw.tokens(tokens, problem.weight.columns)
    experts = 0 if problem.expert_down is None else len(problem.expert_down[0])
    expert = draw.integers(-1, experts, tokens, dtype=torch.int32) if known and experts else None
    router = problem.router if expert is None else None
    rows = sum(f[0].shape[:-1].numel() for f in (problem.shared_down, problem.expert_down) if f is not None)
    config = down_config(tokens, rows, x.shape[1], device_for(x.device).processors)
    factors = (problem.shared_down, problem.expert_down)

    def call() -> Down:
        return down(x, *factors, router, x, expert, config=config, workspace=workspace_of(x.device))

    exact = down_reference(x.double(), *factors)
    worst = 0.0
    if problem.shared_down is not None:
        worst = error(twice(lambda: call().shared_z), exact.shared_z)
    if router is not None:
        scores = x.double().abs() @ router[0].double().T
        expert = twice(lambda: call().expert)[0]
        gap = scores.gather(1, expert.long()[:, None])[:, 0] - scores.amin(dim=1)
        worst = max(worst, float((gap / (1e-5 * x.double().abs().sum(dim=1))).max()))
    if expert is not None:
        has = expert >= 0
        own = expert.clamp_min(0).long()[:, None, None].expand(-1, 1, exact.expert_z.shape[2])
        z = twice(lambda: call().expert_z.gather(1, own)[has])
        worst = max(worst, error(z, exact.expert_z.gather(1, own)[has]))
    return Found(f"down {tokens}x{x.shape[1]} -> {rows}{' known' if known else ''}", worst, str(config))


def check_linear(draw: Random, problem: Problem, tokens: int, config: Config | None) -> Found:
    """config: None for weights that are dequantized once."""
    x = draw.tokens(tokens, problem.weight.columns)
    given = prologue(problem, x)
    arguments = (*given[:2], problem.weight, *given[2:], problem.bias)
    if config is None:
        y = twice(lambda: linear_on_dense_weight(*arguments, out_dtype=x.dtype))
    else:
        workspace = workspace_of(x.device)
        y = twice(lambda: linear(*arguments, out_dtype=x.dtype, config=config, workspace=workspace))
    exact = linear_reference(*arguments, out_dtype=torch.float64, compute=torch.float64)
    shape = f"{tokens}x{problem.weight.columns} -> {problem.weight.rows}"
    return Found(f"linear {problem.format.name} {shape}", error(y, exact), str(config or "dequantized once"))


def checks(device: torch.device, seed: int, small: bool) -> Iterator[Found]:
    """small: sizes for the interpreter and for compute-sanitizer."""
    pick = random.Random(seed)
    for dtype in (torch.bfloat16, torch.float16):
        draw = Random(seed, device, dtype)
        for bits in (4,) if small else range(2, 9):
            for int8 in (False, True):
                yield check_layout(draw, bits, int8, pick.choice((None, 128)))
        widths = (96, 200) if small else (1000, 3584, 8192, 29568)
        for width in widths:
            for norm in (False, True):
                for format in FORMATS.values():
                    if format.act_bits is not None:
                        tokens = pick.randint(1, 4 if small else 300)
                        capped = replace(format, outliers=min(format.outliers, width // 4))
                        yield check_quantize(draw, tokens, width, capped, norm)
        for _ in range(1 if small else 2):
            yield from check_problems(draw, pick, small)


def check_problems(draw: Random, pick: random.Random, small: bool) -> Iterator[Found]:
    """Each format with each repair, of random shapes."""
    sizes, widths = ((65, 130), (128, 200)) if small else ((64, 3000), (256, 5000))
    counts = [1, 5, 17] if small else [1, 3, 16, 17, 64, 100, 257, 700, 1500]
    pick.shuffle(counts)
    turn = cycle(counts)
    for repair in REPAIRS.values():
        if small and repair.shared:
            repair = replace(repair, shared=32, experts=min(repair.experts, 3))
        for format in FORMATS.values():
            inputs = pick.randint(*widths)
            inputs -= inputs % (format.group_size or 2)  # 4-bit factors are pairs
            layer = Layer("random", pick.randint(*sizes), inputs)
            format = replace(format, outliers=min(format.outliers, inputs // 4))
            problem = draw.repaired(draw.problem(layer, format), repair)
            if pick.random() < 0.5:
                problem = replace(problem, bias=draw.normal(layer.outputs))
            tokens = next(turn)
            if repair.shared:
                yield check_down(draw, problem, tokens, known=pick.random() < 0.5)
            config = choose(device_for(draw.device), problem.weight, tokens)
            yield check_linear(draw, problem, tokens, config)
            if config is not None:
                yield check_linear(draw, problem, tokens, None)


def sanitized(command: Sequence[str], minutes: float = 3.0) -> dict[str, str]:
    """What compute-sanitizer says of the small checks, tool by tool; empty where it is not installed."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {}
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else overruns stay within a cached block
    said = {}
    for tool in ("memcheck", "racecheck"):
        whole = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, *command]
        try:
            done = subprocess.run(
                whole, env=environment, capture_output=True, text=True, check=False, timeout=60 * minutes
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            said[tool] = f"not done after {minutes:.0f} minutes"
        else:
            said[tool] = "clean" if done.returncode == 0 else f"failed: {(done.stdout + done.stderr)[-2000:]}"
    return said
