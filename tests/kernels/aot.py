"""Kernels built ahead of time, without a GPU, and what ptxas made of them.

Interpreted functions cannot be compiled, and whether a function is interpreted is decided where it is decorated: so
builds run in a process of their own, without TRITON_INTERPRET.
"""

import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block may have, by capability."""

TENSOR_CORE = r"(HGMMA|IGMMA|HMMA|IMMA)\b"
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


@dataclass(frozen=True)
class Build:
    registers: int
    stack: int
    shared: int
    """Bytes."""
    sass: tuple[str, ...]
    """The instructions, without predicates."""
    loop: tuple[str, ...]
    """Those of the main loop: the innermost one that has the most tensor core instructions."""

    @property
    def spills(self) -> int:
        return count(self.sass, r"(STL|LDL)\b")


def count(sass: Sequence[str], pattern: str) -> int:
    return sum(re.match(pattern, instruction) is not None for instruction in sass)


_built: dict[str, Build] = {}


def build(jobs: Sequence[Job]) -> list[Build]:
    """Each job is built once in a test session."""
    missing = {repr(job): job for job in jobs if repr(job) not in _built}
    if missing:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop("TRITON_INTERPRET", None)
        result = subprocess.run(
            [sys.executable, "-c", "from tests.kernels.aot import serve; serve()"],
            input=pickle.dumps(list(missing.values())),
            capture_output=True,
            env=environment,
            check=False,
        )
        assert result.returncode == 0, result.stderr.decode()
        _built.update(zip(missing, pickle.loads(result.stdout), strict=True))
    return [_built[repr(job)] for job in jobs]


def serve() -> None:
    """The process of its own: jobs on standard input, builds on standard output."""
    jobs = pickle.load(sys.stdin.buffer)
    pickle.dump([_compile(job) for job in jobs], sys.stdout.buffer)


def _compile(job: Job) -> Build:
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

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", cubin.name)
        listing = _run(tools / "nvdisasm", "-c", cubin.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    sass, loops = _parse(listing)
    return Build(int(registers), int(stack), kernel.metadata.shared, sass, _main_loop(sass, loops))


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


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _parse(listing: str) -> tuple[tuple[str, ...], list[tuple[int, int]]]:
    """Instructions, and the first and last of each loop: where a branch goes back to a label."""
    sass, labels, loops = [], {}, []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(sass)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z].*?)\s*;", line):
            target = re.search(r"^BRA.*`\((\.L_\w+)\)", instruction[1])
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(sass)))
            sass.append(instruction[1])
    return tuple(sass), loops


def _main_loop(sass: tuple[str, ...], loops: list[tuple[int, int]]) -> tuple[str, ...]:
    bodies = [sass[first : last + 1] for first, last in loops]
    return max(bodies, key=lambda body: (count(body, TENSOR_CORE), -len(body)), default=())
