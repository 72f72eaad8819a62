"""What an architecture file provides. Modules come from transformers, empty, and are filled from the source."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from qe_dist.core.batch import Batch
from qe_dist.core.errors import CheckpointError
from qe_dist.core.rotation import RotationSites
from qe_dist.core.sample import Example, Sample
from qe_dist.core.source import WeightSource
from qe_dist.core.spec import BlockSpec, Feeder, InputGroup, ModelSpec

RunBlock = Callable[[Batch], Tensor]
"""A block with its weights: hidden states after it, [B, L, D]."""
BlockLoader = Callable[[], RunBlock]


@runtime_checkable
class Encoder(Protocol):
    def __call__(self, sample: Sample, images: Sequence[Image.Image]) -> Example: ...


@runtime_checkable
class Prelude(Protocol):
    """Embeddings and vision tower."""

    def __call__(self, examples: Sequence[Example], index: int) -> Batch: ...


@runtime_checkable
class Arch(Protocol):
    model_types: tuple[str, ...]
    blocks: str
    """Where the Hugging Face model has its blocks (`model.language_model.layers`)."""
    unquantized: tuple[str, ...]
    """Its linears outside of the blocks, as compressed-tensors ignores them: names, or patterns after `re:`."""

    def warm_up(self) -> None:
        """Imports what blocks are made of: seconds, which a worker has while others are still being started."""
        ...

    def groups(self, config: Mapping[str, Any]) -> tuple[InputGroup, ...]:
        """Of one block, as `config.json` has them; whether linears have a bias is not known there."""
        ...

    def vision_heads(self, config: Mapping[str, Any]) -> int:
        """Attention heads of the vision tower, which engines cut over ranks, too; 0 for a model of text only."""
        ...

    def widened(self, config: Mapping[str, Any], width: int) -> Mapping[str, Any]:
        """`config.json` with another inner width of the MLPs."""
        ...

    def spec(self, source: WeightSource) -> ModelSpec:
        """Names and shapes, checked against the tensors on disk."""
        ...

    def encoder(self, folder: Path) -> Encoder: ...

    def prelude(self, source: WeightSource, device: str, dtype: torch.dtype) -> Prelude: ...

    def empty_block(self, config: Mapping[str, Any], index: int) -> nn.Module:
        """One decoder block on the meta device."""
        ...

    def last_norm(self, source: WeightSource, device: str, dtype: torch.dtype) -> nn.Module:
        """What stands between the last block and the head."""
        ...

    def head(self, source: WeightSource) -> str:
        """Name of the tensor that is the head; that of the embeddings where they are tied."""
        ...

    def block(self, source: WeightSource, spec: BlockSpec, device: str, dtype: torch.dtype) -> nn.Module:
        """One decoder block with its weights. Peak memory: the block."""
        ...

    def run_block(self, block: nn.Module, batch: Batch) -> Tensor:
        """Hidden states after the block, [B, L, D]."""
        ...

    def model_inputs(self, examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
        """Right-padded keyword arguments of the whole Hugging Face model."""
        ...

    def rotation_sites(self, source: WeightSource) -> RotationSites:
        """Every tensor that writes or reads the residual stream, or an attention head's values."""
        ...

    def feeders(self, config: Mapping[str, Any]) -> Mapping[str, Feeder]:
        """Of every linear of a block."""
        ...

    def tiny_config(self) -> Mapping[str, Any]:
        """A `config.json` of a model that takes milliseconds, for tests."""
        ...


def fill(
    module: nn.Module,
    source: WeightSource,
    disk_name: Mapping[str, str],
    device: str,
    dtype: torch.dtype,
    packed: Collection[str] = (),
) -> nn.Module:
    """Gives a module on the meta device its weights, by name, and freezes it. packed: those that stay as on disk."""
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
