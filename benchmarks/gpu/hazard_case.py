"""The smallest kernel whose machine code for Hopper overwrites registers that a running product reads.

    python benchmarks/gpu/hazard_case.py        needs Triton and no GPU; exits with 1 where the code is wrong

Left operands that are loaded as bytes and converted lie in registers. Triton 3.6 and 3.7 let the product of one step
run while the next step's operand is converted, and ptxas 12.8 writes it into the same registers, though the PTX manual
demands `wgmma.wait_group` before that. The second build waits (`qe_kernels.products.finished` is that way) and is
right. TRITON_PTXAS_PATH takes another ptxas. Related reports: triton-lang/triton issue 9433 and pull request 11781.
"""

import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.kernels.sass import Hazard, disassemble, hazards, parse


@triton.jit
def product(w, x, y, K, WAIT: tl.constexpr):
    """y [64, 64] = w [64, K] x [K, 64]: w of int8, x of bf16."""
    rows, columns, depth = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 128)
    acc = tl.zeros([64, 64], tl.float32)
    for k in tl.range(0, K, 128):
        left = tl.load(w + rows[:, None] * K + k + depth[None, :]).to(tl.bfloat16)
        right = tl.load(x + (k + depth)[:, None] + columns[None, :] * K)
        acc = tl.dot(left, right, acc)
        if WAIT:
            acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], tl.float32, is_pure=True, pack=1)
    tl.store(y + rows[:, None] * 64 + columns[None, :], acc)


def found(wait: bool) -> list[Hazard]:
    """What is wrong with the code for sm_90."""
    signature = {"w": "*i8", "x": "*bf16", "y": "*fp32", "K": "i32", "WAIT": "constexpr"}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(fn=product, signature=signature, constexprs={(4,): wait}, attrs=attributes)
    options = {"num_warps": 4, "num_stages": 4}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return hazards(parse(disassemble(kernel.asm["cubin"])))


def main() -> int:
    for wait in (False, True):
        wrong = found(wait)
        print(f"{'with' if wait else 'without'} the wait: {len(wrong)} places, Triton {triton.__version__}")
        for hazard in wrong[:5]:
            print(f"  {hazard.at:#x} {hazard.text}: {hazard.kind} of the product at {hazard.product:#x}")
    return int(bool(found(False)))


if __name__ == "__main__":
    sys.exit(main())
