"""Which channels leave the grid of a token, as the kernels read it: a mask that is made once, at load."""

import torch
from torch import Tensor


def extracted_columns(columns: int, shared_channels: Tensor | None, expert_channels: Tensor | None) -> Tensor:
    """uint8 [E + 1, columns], 1 where channels are extracted: row 0 by the shared expert, row e + 1 also by expert e.
    `columns` stands for channels that another rank has.
    Made once at load: a kernel cannot turn a list of channels into a mask in registers."""
    given = next(channels for channels in (shared_channels, expert_channels) if channels is not None)
    experts = 0 if expert_channels is None else len(expert_channels)
    mask = given.new_zeros(experts + 1, columns + 1, dtype=torch.uint8)
    if shared_channels is not None:
        mask[:, shared_channels.long()] = 1
    if expert_channels is not None:
        mask[1:].scatter_(1, expert_channels.long(), 1)
    return mask[:, :-1].contiguous()
