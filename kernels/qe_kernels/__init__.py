"""Triton kernels for the quantized linear, with references in torch for all that has no such GPU.

At load: `pack_weight` for `order_for(device)`, and `extracted_columns` where experts extract channels. At run time the
calls of `ops`: rotate, quantize, down, route, linear. docs/how/kernels.md describes them.
"""

from qe_kernels import ops
from qe_kernels.down import Down
from qe_kernels.extraction import extracted_columns
from qe_kernels.layout import Order, Weight, order_for, pack_weight, unpack_weight
from qe_kernels.linear import Branch
from qe_kernels.quantize import Activations

__all__ = [
    "Activations",
    "Branch",
    "Down",
    "Order",
    "Weight",
    "extracted_columns",
    "ops",
    "order_for",
    "pack_weight",
    "unpack_weight",
]
