"""An input group at run time, whichever engine calls it (transformers, vLLM) and whatever computes it."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qe_dist.core.errors import ConfigError


def backend(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """What runs tensors of this dtype there: `on_kernels` for 16 bits on a GPU, else `on_reference`.

    ConfigError for a GPU that the kernels do not know, rather than a model that is unexpectedly slow.
    """
    from qe_dist.serve import on_reference

    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return on_reference
    from qe_kernels.dispatch import CAPABILITIES, device_of

    if device_of(device) is None:
        known = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        raise ConfigError(
            f"{device} is {torch.cuda.get_device_name(device)}; the kernels need Triton and an NVIDIA GPU of compute "
            f"capability {known}. Any other runs the plain-torch formula, slowly, if you ask for dtype float32"
        )
    from qe_dist.serve import on_kernels

    return on_kernels


class Group:
    """Prepares the tensor that a group's linears read, and chooses experts where routers read it.

    What it chooses for another group waits there (`expert`) until that group runs, and is taken once. It cannot be
    handed on as a value: engines call every linear with its input alone, and between two groups runs code of theirs.
    """

    def __init__(self, input: Any) -> None:
        self.input = input
        self.expert: Tensor | None = None
        """The experts of the coming tokens [M], chosen by the group whose input the router reads."""
        self.readers: list[Group] = []
        """Groups whose router reads this group's input; itself perhaps among them."""
        self.routers: Tensor | None = None
        """[readers, E, H]"""

    def choose_for(self, reader: "Group", router: Tensor) -> None:
        """Lets the experts of `reader` be chosen by its router [E, H] from now on, before that group runs."""
        self.readers.append(reader)
        self.routers = router[None] if self.routers is None else torch.cat((self.routers, router[None]))

    def prepare(self, x: Tensor, modality: Tensor | None = None) -> Any:
        """x [M, I] as the linears of the group want it."""
        if self.routers is not None:
            for reader, expert in zip(self.readers, self.input.choose(self.routers, x), strict=True):
                reader.expert = expert
        expert, self.expert = self.expert, None
        return self.input.prepare(x, expert, modality)
