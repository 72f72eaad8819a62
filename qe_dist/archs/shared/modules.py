"""Modules of transformers: made empty, filled from the source, and stopped where the blocks begin."""

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qe_dist.core.errors import CheckpointError
from qe_dist.core.source import WeightSource


def empty(make: Callable[[], nn.Module], include_buffers: bool) -> nn.Module:
    """A module whose parameters are on the meta device. include_buffers: its buffers are there, too."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=include_buffers):
        return make()


def fill(
    module: nn.Module,
    source: WeightSource,
    disk_name: Mapping[str, str],
    device: str,
    dtype: torch.dtype,
    packed: Collection[str] = (),
) -> nn.Module:
    """Gives a module on the meta device its weights, by name, and freezes it. packed: those that stay as on disk.

    CheckpointError where a tensor is missing or has another shape than the module.
    """
    weights = {}
    for name, parameter in module.named_parameters():
        tensor = source.get(disk_name[name])
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{source.folder}: {disk_name[name]} has shape {tuple(tensor.shape)}, "
                f"config.json asks for {tuple(parameter.shape)}"
            )
        weights[name] = tensor.to(device=device, dtype=tensor.dtype if name in packed else dtype)
    module.load_state_dict(weights, strict=False, assign=True)
    return module.requires_grad_(False).eval().to(device)


class _Caught(Exception):
    """Ends the forward of the model when the input of the first block is known."""


class Catcher(nn.Module):
    """Stands in the place of the blocks of a decoder."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.caught: tuple[Tensor, Mapping[str, Any]] | None = None
        self.of_decoder: Mapping[str, Any] = {}
        decoder.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, decoder: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        self.of_decoder = given

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        self.caught = (hidden_states, {**self.of_decoder, **given})
        raise _Caught

    @torch.no_grad()
    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Any]]:
        """Hidden states [B, L, D] as they enter the first block, and the keyword arguments that the decoder and its
        first block are called with, those of the block before those of the decoder."""
        with contextlib.suppress(_Caught):
            model(**inputs, use_cache=False)
        assert self.caught is not None, "the model ended before its first block"
        return self.caught
