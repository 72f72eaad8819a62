"""Triton kernels for the quantized linear, with references in torch for all that has no such GPU.

At load: `pack_weight` and `pack_up` for `order_for(device)`, `padded_down` and `padded_channels` for ranks, and
`extracted_columns` where experts extract channels. At run time the calls of `ops`: rotate, quantize, down, route,
linear. docs/how/kernels.md describes them.
"""

from qe_kernels import ops
from qe_kernels.branches import Branch, pack_up
from qe_kernels.down import Down
from qe_kernels.extraction import extracted_columns
from qe_kernels.factors import padded_channels, padded_down
from qe_kernels.layout import Order, Weight, order_for, pack_weight, unpack_weight
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
    "pack_up",
    "pack_weight",
    "padded_channels",
    "padded_down",
    "unpack_weight",
]
