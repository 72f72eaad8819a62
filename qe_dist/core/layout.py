"""The format of a checkpoint: what `quantization_config` in config.json says, block by block and tensor by tensor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.quantized import GroupInput, input_from_tensors
from qe_dist.core.scheme import Scheme
from qe_dist.core.version import FIRST, VERSION

METHOD = "qe"
FORMAT = "pack-quantized"
VERSIONS = (2, 3)
"""3: the input of some group is rotated at run time, which a reader of 2 would leave out without a word."""


def check_version(found: Any) -> None:
    """CheckpointError where the checkpoint was written in another format version than those of VERSIONS."""
    if found not in VERSIONS:
        later = isinstance(found, int) and found > max(VERSIONS)
        earlier = f"qe_dist {FIRST}", "quantize the model again"
        writer, advice = ("a later qe_dist", "install that") if later else earlier
        raise CheckpointError(
            f"this checkpoint has format version {found}, which {writer} wrote; qe_dist {VERSION} reads "
            f"{' and '.join(map(str, VERSIONS))}; {advice}"
        )


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a stored tensor."""

    dtype: str
    """The name that torch has for it: `bfloat16`."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """The type and shape of this tensor."""
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @classmethod
    def from_json(cls, said: Sequence[Any]) -> "TensorSpec":
        """Reads `[dtype, *shape]`, as config.json has it."""
        dtype, *shape = said
        return cls(dtype, tuple(shape))

    def to_json(self) -> list[Any]:
        """Writes `[dtype, *shape]`."""
        return [self.dtype, *self.shape]

    def empty(self) -> Tensor:
        """A tensor of this type and shape on the meta device."""
        return torch.empty(self.shape, dtype=self.torch_dtype, device="meta")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


TensorSpecs = Mapping[str, TensorSpec]
"""The tensors of one module, by their names within it."""


@dataclass(frozen=True)
class GroupLayout:
    """The tensors of an input group, and how it computes with them."""

    scheme: Scheme
    router_input: str
    """The group whose input the router reads."""
    input: TensorSpecs
    """Those of the module `<group>_input`."""
    linears: Mapping[str, TensorSpecs]

    @property
    def part(self) -> GroupInput:
        """The group's input without its numbers: tensors on the meta device."""
        return input_from_tensors({name: spec.empty() for name, spec in self.input.items()})

    @property
    def routed(self) -> bool:
        """Whether a router chooses the expert of a token."""
        return self.part.router is not None

    @property
    def by_modality(self) -> bool:
        """Whether text and image tokens are treated differently (`GroupInput.by_modality`)."""
        return self.part.by_modality

    @property
    def extracts(self) -> bool:
        """Whether channels leave the grid of the activations."""
        return self.part.shared_channels is not None or self.part.expert_channels is not None

    @property
    def rotated_block(self) -> int:
        """Input channels that the rotation at run time mixes; 1 where there is none."""
        return math.prod(factor.shape[-1] for factor in self.part.rotation)

    @property
    def static_rank(self) -> int:
        """Rank of all that is added for every token alike: shared factors, shared and salient channels."""
        part = self.part
        repairs = (part.shared_down, part.shared_channels, part.salient_channels)
        return sum(repair.shape[0] for repair in repairs if repair is not None)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "GroupLayout":
        """Reads a group of a block in config.json. KeyError, TypeError or ValueError where it is damaged."""
        linears = {name: _specs(tensors) for name, tensors in said["linears"].items()}
        return cls(Scheme.parse(said["scheme"]), said["router_input"], _specs(said["input"]), linears)

    def to_json(self) -> dict[str, Any]:
        """Writes what `from_json` reads."""
        return {
            "scheme": str(self.scheme),
            "router_input": self.router_input,
            "input": {name: spec.to_json() for name, spec in self.input.items()},
            "linears": {n: {t: spec.to_json() for t, spec in x.items()} for n, x in self.linears.items()},
        }


@dataclass(frozen=True)
class BlockLayout:
    """The input groups of one block, by name."""

    groups: Mapping[str, GroupLayout]

    @property
    def modules(self) -> Mapping[str, TensorSpecs]:
        """All modules that hold quantized tensors, by their names within the block."""
        inputs = {f"{name}_input": group.input for name, group in self.groups.items()}
        return inputs | {name: tensors for group in self.groups.values() for name, tensors in group.linears.items()}

    @property
    def tensors(self) -> TensorSpecs:
        """All quantized tensors, by their names within the block."""
        return {f"{m}.{name}": spec for m, tensors in self.modules.items() for name, spec in tensors.items()}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "BlockLayout":
        """Reads one of `layouts` in config.json. KeyError, TypeError or ValueError where it is damaged."""
        return cls({name: GroupLayout.from_json(group) for name, group in said.items()})

    def to_json(self) -> dict[str, Any]:
        """Writes what `from_json` reads."""
        return {name: group.to_json() for name, group in self.groups.items()}


@dataclass(frozen=True)
class Layout:
    """All that config.json says about the quantized blocks of a model."""

    blocks: tuple[BlockLayout, ...]

    @property
    def distinct(self) -> list[BlockLayout]:
        """Every layout once, in the order in which blocks have them."""
        found: list[BlockLayout] = []
        for block in self.blocks:
            if block not in found:
                found.append(block)
        return found

    @classmethod
    def from_json(cls, said: Mapping[str, Any] | None) -> "Layout":
        """Reads `quantization_config`. ConfigError where there is none, or one of another method; CheckpointError where
        it has another format version, or is damaged."""
        found = said and said.get("quant_method")
        if said is None or found != METHOD:
            by = f"was quantized by {found}" if found else "is not quantized"
            raise ConfigError(f"the model {by}: config.json has no quantization_config of qe_dist")
        check_version(said.get("version"))
        try:
            distinct = [BlockLayout.from_json(block) for block in said["layouts"]]
            return cls(tuple(distinct[index] for index in said["block_layouts"]))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"quantization_config in config.json is damaged: {error!r}; copy it again") from None

    def to_json(self) -> dict[str, Any]:
        """Equal layouts are written once."""
        distinct = self.distinct
        rotated = any(group.rotated_block > 1 for block in distinct for group in block.groups.values())
        return {
            "quant_method": METHOD,
            "format": FORMAT,
            "version": 3 if rotated else 2,
            "layouts": [block.to_json() for block in distinct],
            "block_layouts": [distinct.index(block) for block in self.blocks],
        }


def _specs(said: Mapping[str, Any]) -> TensorSpecs:
    return {name: TensorSpec.from_json(one) for name, one in said.items()}
