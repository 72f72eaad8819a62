"""Products of tiles on tensor cores whose left operand is made in registers.

Hopper multiplies while the threads go on. Where the left operand lies in registers, the compilers (Triton 3.6 and 3.7
with ptxas 12.8, 12.9 and 13.5) write the next step's values into them while a product may still read them. The PTX
manual forbids that: the result would depend on timing. Triton waits for a product where something else than the next
product reads its result, so `finished` stands behind every product. It changes nothing and costs no instruction. What
is lost is that a warpgroup unpacks while its own product runs; other warpgroups of a multiprocessor still do.
tests/kernels/test_hazards.py reads the machine code of every tile.
"""

from qe_kernels.triton_if_any import INTERPRET, tl, triton


@triton.jit
def finished(product):
    """The product itself, of 32 bits an element; in compiled code, after the tensor core has finished it."""
    if INTERPRET:
        return product
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [product], product.dtype, is_pure=True, pack=1)


@triton.jit
def dot(a, b, acc):
    """a b + acc (None: 0). The interpreter would take bf16 for integers."""
    if INTERPRET and b.dtype != tl.int8:
        b = b.to(tl.float32)
    return finished(tl.dot(a, b, acc, out_dtype=tl.int32 if b.dtype == tl.int8 else tl.float32))
