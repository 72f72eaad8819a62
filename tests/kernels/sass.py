"""Reads the machine code of a kernel for Hopper and finds registers that are used while a tensor core still needs them.

A warpgroup's product (WGMMA, in SASS HGMMA or IGMMA) runs on while the threads go on. Until a wait covers it, the PTX
manual forbids any access to its accumulators, and any write to the registers that hold its left operand. A compiler
that gets this wrong makes a kernel that is right or wrong by luck of the timing, so the code is checked and not the
result. https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions

    products(parse(disassemble(cubin)))        hazards(parse(disassemble(cubin)))
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

PRODUCT = re.compile(r"[HIQ]GMMA\.64x(\d+)x\d+\S* R(\d+), (?:R(\d+), )?gdesc")
TENSOR_CORE = r"([HIQ]GMMA|HMMA|IMMA)\b"
COMMIT = "gsb0"
"""The last product of a group, in its operands."""
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
LEFT_REGISTERS = 4
"""Of a thread, for 64 x 16 values of 16 bits or 64 x 32 of 8."""
NOTHING_WRITTEN = re.compile(
    r"(ST[GSL]?|RED|LDGSTS|BRA|BRX|JMP|CALL|RET|EXIT|BAR|BSSY|BSYNC|WARPGROUP|WARPSYNC|DEPBAR|LDGDEPBAR|MEMBAR|FENCE"
    r"|CCTL|ERRBAR|NOP|SYNCS|UTMA\w*|R2UR|R2P|P2R\.|[A-Z]+SETP2?|PLOP3|FCHK|VOTEU|U[A-Z]\w*)\b"
)


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    """Without predicate."""
    predicate: str
    target: int | None = None
    """Where a branch goes: an index into the instructions."""


@dataclass(frozen=True)
class Product:
    """A WGMMA of one warpgroup."""

    accumulator: range
    left: range
    """Registers of a thread; empty where the left operand lies in shared memory."""
    commits: bool


@dataclass(frozen=True, order=True)
class Hazard:
    product: int
    """The address of the WGMMA that may still be running."""
    at: int
    """The address of the instruction that comes too early."""
    kind: str
    """`left operand` or `accumulator`."""
    registers: tuple[int, ...]
    text: str


def disassemble(cubin: bytes) -> str:
    """The listing of nvdisasm, which Triton brings."""
    return _tool("nvdisasm", "-c", cubin=cubin)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack)."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", cubin=cubin))
    if found is None:
        raise ValueError("cuobjdump -res-usage: expected REG and STACK of one kernel, found none")
    return int(found[1]), int(found[2])


def _tool(name: str, *options: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> list[Instruction]:
    """Of a listing with one kernel, in the order of addresses."""
    found: list[tuple[int, str, str]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif code := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(@\S+\s+)?([A-Z].*?)\s*;", line):
            found.append((int(code[1], 16), code[3], (code[2] or "").strip()))
    return [Instruction(address, text, predicate, _target(text, labels)) for address, text, predicate in found]


def _target(text: str, labels: Mapping[str, int]) -> int | None:
    label = re.match(r"BRA.*`\((\.L_\w+)\)", text)
    return labels.get(label[1]) if label else None


def product(instruction: Instruction) -> Product | None:
    found = PRODUCT.match(instruction.text)
    if found is None:
        return None
    width, accumulator, left = int(found[1]), int(found[2]), found[3]
    return Product(
        range(accumulator, accumulator + width // 2),
        range(int(left), int(left) + LEFT_REGISTERS) if left else range(0),
        COMMIT in instruction.text,
    )


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Bodies of the innermost loops with tensor core instructions, in the order of the code."""
    ends = [(i.target, n) for n, i in enumerate(code) if i.target is not None and i.target <= n]
    inner = [(a, b) for a, b in ends if not any((a, b) != (c, d) and a <= c and d <= b for c, d in ends)]
    bodies = [list(code[first : last + 1]) for first, last in sorted(inner)]
    return [body for body in bodies if count(body, TENSOR_CORE)]


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The first of those; empty where there is none."""
    return next(iter(loops(code)), [])


def count(code: Sequence[Instruction], pattern: str) -> int:
    return sum(re.match(pattern, instruction.text) is not None for instruction in code)


Pending = dict[int, int]
"""Products that may be running, by index: how many groups were committed since, its own among them; 0: not yet."""


def hazards(code: Sequence[Instruction]) -> list[Hazard]:
    """Every instruction that a thread may reach, on any path, while a product still owns a register that it touches.

    Where paths meet, a product counts as running if it may be on one of them, with the fewest groups behind it.
    """
    products = {n: found for n, i in enumerate(code) if (found := product(i)) is not None}
    before: list[Pending | None] = [None] * len(code)
    todo: list[int] = []
    if products:
        before[0], todo = {}, [0]
    while todo:
        n = heappop(todo)  # the lowest first: what leads to a place is mostly done before it
        after = _after(n, code, products, before[n] or {})
        for following in _following(n, code):
            merged = _merge(before[following], after)
            if merged != before[following]:
                before[following] = merged
                heappush(todo, following)
    found = {h for n, state in enumerate(before) for h in _touched(n, code, products, state or {})}
    return sorted(found)


def _merge(one: Pending | None, other: Pending) -> Pending:
    if one is None:
        return other
    return {n: min(one.get(n, 99), other.get(n, 99)) for n in one.keys() | other.keys()}


def _following(n: int, code: Sequence[Instruction]) -> Iterator[int]:
    instruction = code[n]
    always = not instruction.predicate and re.match(r"(BRA `|EXIT|RET|BRX|JMP)", instruction.text)
    if instruction.target is not None:
        yield instruction.target
    if not always and n + 1 < len(code):
        yield n + 1


def _after(n: int, code: Sequence[Instruction], products: Mapping[int, Product], state: Pending) -> Pending:
    instruction = code[n]
    if wait := WAIT.match(instruction.text):
        return {p: age for p, age in state.items() if not age or age <= int(wait[1], 16)}
    if n not in products:
        return state
    state = {**state, n: 0}
    return {p: age + 1 for p, age in state.items()} if products[n].commits else state


def _touched(n: int, code: Sequence[Instruction], products: Mapping[int, Product], state: Pending) -> Iterator[Hazard]:
    """A product may follow products that add to the same accumulators: the tensor core keeps their order."""
    if n in products:
        return
    written, used = _registers(code[n].text)
    for p in state:
        left, accumulator = set(products[p].left), set(products[p].accumulator)
        for kind, registers in (("left operand", written & left), ("accumulator", (written | used) & accumulator)):
            if registers:
                yield Hazard(code[p].address, code[n].address, kind, tuple(sorted(registers)), code[n].text)


def _registers(text: str) -> tuple[set[int], set[int]]:
    """(written, read) registers of an instruction that is no warpgroup product."""
    operation, _, operands = text.partition(" ")
    read = {
        register
        for number, wide in re.findall(r"(?<![A-Z])R(\d+)(\.64)?", operands)
        for register in range(int(number), int(number) + (2 if wide else 1))
    }
    target = re.match(r"(?:U?P[T\d]+,\s*)*R(\d+)\b", operands)
    if target is None or NOTHING_WRITTEN.match(operation):
        return set(), read
    return set(range(int(target[1]), int(target[1]) + _width(operation))), read


def _width(operation: str) -> int:
    """Registers that it writes."""
    if ".128" in operation or re.match(r"LDSM\S*\.4$", operation) or re.match(r"(HMMA|IMMA)", operation):
        return 4
    if re.search(r"\.(64|WIDE)\b", operation) or re.match(r"LDSM\S*\.2$|CS2R(?!\.32)|D[A-Z]+", operation):
        return 2
    return 1
