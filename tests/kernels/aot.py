"""Kernels built ahead of time, without a GPU, and what ptxas made of them.

Interpreted functions cannot be compiled, and whether a function is interpreted is decided where it is decorated: so
builds run in a process of their own, without TRITON_INTERPRET.
"""

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.kernels.sass import (
    TENSOR_CORE,
    Hazard,
    Instruction,
    count,
    disassemble,
    hazards,
    loops,
    main_loop,
    parse,
    resources,
)  # fmt: skip

__all__ = ["TENSOR_CORE", "count"]

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block may have, by capability."""

FROM_REGISTERS = r"[HI]GMMA\S* R\d+, R\d+, gdesc"
"""A warpgroup's product whose left operand lies in registers."""


@dataclass(frozen=True)
class Job:
    function: str
    """`module:name` of a kernel."""
    signature: Mapping[str, Any]
    """Of the arguments that are known at run time: `*bf16`, `i32`; `*bf16:16` and `i32:16` if divisible by 16. Of a
    tuple: a tuple of these, where what is no string is a constant."""
    constexprs: Mapping[str, Any]
    capability: int
    warps: int = 4
    stages: int = 4
    unfinished: bool = False
    """Without `products.finished`: as the compilers would do it."""


@dataclass(frozen=True)
class Build:
    registers: int
    stack: int
    shared: int
    """Bytes."""
    sass: tuple[Instruction, ...]
    loop: tuple[Instruction, ...]
    """Those of the main loop: the first innermost one that has tensor core instructions."""

    @property
    def spills(self) -> int:
        return count(self.sass, r"(STL|LDL)\b")

    @property
    def loops(self) -> list[list[Instruction]]:
        return loops(self.sass)

    @property
    def hazards(self) -> list[Hazard]:
        return hazards(self.sass)


_built: dict[str, Build] = {}


def build(jobs: Sequence[Job]) -> list[Build]:
    """Each job is built once in a test session."""
    missing = {repr(job): job for job in jobs if repr(job) not in _built}
    for unfinished in (False, True):
        here = {name: job for name, job in missing.items() if job.unfinished == unfinished}
        if here:
            _built.update(zip(here, _elsewhere(list(here.values()), unfinished), strict=True))
    return [_built[repr(job)] for job in jobs]


def _elsewhere(jobs: list[Job], unfinished: bool) -> list[Build]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-c", f"from tests.kernels.aot import serve; serve({unfinished})"],
        input=pickle.dumps(jobs),
        capture_output=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()
    return pickle.loads(result.stdout)


def serve(unfinished: bool) -> None:
    """The process of its own: jobs on standard input, builds on standard output."""
    if unfinished:
        leave_products_unfinished()
    jobs = pickle.load(sys.stdin.buffer)
    pickle.dump([compile_job(job) for job in jobs], sys.stdout.buffer)


def leave_products_unfinished() -> None:
    """For all kernels of this process: Triton looks functions up when a kernel is compiled for the first time."""
    import triton
    from qe_kernels import down, products

    products.finished = down.finished = triton.jit(_as_it_is)


def _as_it_is(product):
    return product


def compile_job(job: Job) -> Build:
    """In this process, where nothing is interpreted."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = job.function.split(":")
    function = getattr(importlib.import_module(module), name)
    signature, constants, divisible = {}, {}, {}
    for i, argument in enumerate(function.arg_names):
        kind = job.signature[argument] if argument in job.signature else tl.constexpr(job.constexprs.get(argument))
        signature[argument] = _describe(kind, (i,), constants, divisible)
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=divisible)
    options = {"num_warps": job.warps, "num_stages": job.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=options)
    code = parse(disassemble(kernel.asm["cubin"]))
    registers, stack = resources(kernel.asm["cubin"])
    return Build(registers, stack, kernel.metadata.shared, tuple(code), tuple(main_loop(code)))


def _describe(kind: Any, path: tuple[int, ...], constants: dict[Any, Any], divisible: dict[Any, Any]) -> Any:
    """The type of an argument as Triton writes it; constants and divisibility go to their dictionaries, by path."""
    if isinstance(kind, tuple):
        parts = (_describe(part, (*path, i), constants, divisible) for i, part in enumerate(kind))
        return type(kind)(*parts) if hasattr(kind, "_fields") else tuple(parts)
    if not isinstance(kind, str):
        constants[path] = getattr(kind, "value", kind)
        return "constexpr"
    name, _, divisor = kind.partition(":")
    if divisor:
        divisible[path] = [["tt.divisibility", int(divisor)]]
    return name
