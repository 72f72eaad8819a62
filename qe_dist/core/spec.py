"""What a model consists of, by name and shape, without a weight in memory."""

from dataclasses import dataclass, replace
from typing import Literal

Granularity = Literal["group", "linear"]
RouterInput = Literal["sublayer", "own"]


@dataclass(frozen=True)
class LinearSpec:
    """One linear of a block; `name` is relative to the block (`self_attn.q_proj`)."""

    name: str
    in_features: int
    out_features: int
    bias: bool
    split: Literal["column", "row"]
    """How tensor parallelism cuts it: by outputs or by inputs."""
    heads: int | None = None
    """Attention heads that what is cut consists of: a rank has whole ones. None: no heads."""


@dataclass(frozen=True)
class InputGroup:
    """The linears of a block that read the same tensor: the unit of fitting."""

    name: str
    linears: tuple[LinearSpec, ...]
    router_input: str
    """Name of the group whose input the router reads. A row-parallel group reads the replicated input
    of its sublayer, so that every tensor-parallel rank picks the same expert without an all-reduce."""
    producers: tuple[str, ...] = ()
    """Linears of the block whose outputs make this input channel by channel, and so can absorb a permutation of it."""

    @property
    def in_features(self) -> int:
        """The number of input channels."""
        return self.linears[0].in_features

    @property
    def module(self) -> str:
        """Where the tensors that belong to the group's input live, relative to the block."""
        return f"{self.name}_input"


@dataclass(frozen=True)
class Feeder:
    """What makes the input of a linear channel by channel, and so can divide it by a scale for good: the weight of a
    norm, or the outputs of another linear."""

    module: str
    """Relative to the block."""
    head: int | None = None
    """Width of a head, where one head of the module feeds several of the input (grouped-query attention)."""
    offset: float = 0.0
    """What the module adds to its weight before it multiplies by it."""


@dataclass(frozen=True)
class BlockSpec:
    """One block: its input groups, and the tensors that stay as they are."""

    index: int
    prefix: str
    """Begins the names of its tensors on disk; ends with the dot (`model.layers.0.`)."""
    groups: tuple[InputGroup, ...]
    others: tuple[str, ...]
    """Tensors of the block that stay as they are (norms), relative to the prefix."""
    scratch: int = 0
    """Numbers in float32 that it holds for each token while it runs, beside the inputs of its groups."""

    def group(self, name: str) -> InputGroup:
        """The group of this name. StopIteration where there is none."""
        return next(g for g in self.groups if g.name == name)

    def router_width(self, group: InputGroup) -> int:
        """The channels of the tensor that the router of a group reads."""
        return self.group(group.router_input).in_features

    @property
    def num_weights(self) -> int:
        """The number of weights of all linears, without biases."""
        return sum(x.in_features * x.out_features for g in self.groups for x in g.linears)


@dataclass(frozen=True)
class ModelSpec:
    """The blocks of a model, and the tensors outside of them."""

    arch: str
    blocks: tuple[BlockSpec, ...]
    passthrough: tuple[str, ...]
    """Tensors outside the blocks, which the checkpoint takes over as they are."""

    @property
    def kinds(self) -> tuple[BlockSpec, ...]:
        """The first block of every kind: those of a kind have equal groups."""
        first: dict[tuple[InputGroup, ...], BlockSpec] = {}
        for block in self.blocks:
            first.setdefault(block.groups, block)
        return tuple(first.values())


def view_of(block: BlockSpec, granularity: Granularity, router_input: RouterInput = "sublayer") -> BlockSpec:
    """The block with its groups as a recipe wants them."""
    if granularity == "linear":
        return per_linear(block)
    return on_own_input(block) if router_input == "own" else block


def on_own_input(block: BlockSpec) -> BlockSpec:
    """The block with groups that route on the tensor that they read, row-parallel ones too."""
    return replace(block, groups=tuple(replace(g, router_input=g.name) for g in block.groups))


def per_linear(block: BlockSpec) -> BlockSpec:
    """The block with every linear in a group of its own that routes on its own input (as the paper fits)."""
    groups = tuple(InputGroup(x.name, (x,), x.name, g.producers) for g in block.groups for x in g.linears)
    return replace(block, groups=groups)
