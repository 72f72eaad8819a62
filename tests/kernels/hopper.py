"""A GPU and weights without memory, for tests of choices and of builds."""

import torch
from qe_kernels import Order, Weight
from qe_kernels.dispatch import Device
from qe_kernels.layout import field_widths

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), processors=132)


def weight(rows: int, columns: int, bits: int = 4, group_size: int | None = None, int8: bool = False) -> Weight:
    """Without memory."""
    planes = tuple(
        torch.empty(-(-rows // 64), -(-columns // 128), 64, 16 * width, dtype=torch.uint8, device="meta")
        for width in field_widths(bits)
    )
    groups = 1 if group_size is None else columns // group_size
    scale = torch.empty(groups, rows, device="meta")
    return Weight(planes, scale, rows, columns, bits, group_size, Order.WGMMA, int8)
