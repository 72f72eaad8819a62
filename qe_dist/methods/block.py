"""A whole block as a tuner is given it: the groups that the closed forms fitted, and how the block runs with others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from qe_dist.core.manifest import TuningReport
from qe_dist.core.quantized import QuantizedGroup
from qe_dist.core.spec import BlockSpec
from qe_dist.methods.base import GroupProblem
from qe_dist.numerics.sign_sgd import Training
from qe_dist.numerics.tuned_linear import Group

Forward = Callable[[Int[Tensor, " R"]], Float[Tensor, "R L D"]]
"""Numbers of sequences -> the block's outputs of them, with gradients, padded to the longest of them."""


@dataclass(frozen=True)
class BlockProblem:
    """What a tuner is given of a block. Sequences are padded on the right."""

    groups: Mapping[str, QuantizedGroup]
    """The closed form, by group."""
    problems: Mapping[str, GroupProblem]
    """What they were fitted to, before any transform."""
    factor_bits: int
    place: Callable[[Mapping[str, Group]], Forward]
    """Puts groups into the block, in the place of those before, and returns how it runs with them."""
    targets: Float[Tensor, "N L D"]
    """What the full-precision block answers to full-precision inputs."""
    real: Bool[Tensor, "N L"]
    """False for padding."""
    held_out: Bool[Tensor, " N"]
    """Sequences that nothing is fitted to."""
    seed: int
    watch: Callable[[int, float], None] = lambda step, loss: None
    """Is told now and then how many steps are made, and the held-out loss over that of the closed form."""
    part: range | None = None
    """The steps to make now; None: all. What enters the block may differ between parts, its targets do not."""
    training: Training | None = None
    """Where an earlier call ended: at the end of the part before, or within this one."""
    keep: Callable[[Training], None] = lambda training: None
    """Is given the training after each step, from which it could go on."""

    def weights(self, name: str) -> dict[str, Float[Tensor, "_ I"]]:
        """Weights of a group's linears in the coordinates of its codes."""
        scale = self.groups[name].input.input_scale
        weights = self.problems[name].weights
        return dict(weights) if scale is None else {n: w * scale[0].to(w) for n, w in weights.items()}


@dataclass(frozen=True)
class TunedBlock:
    """Groups of a block, tuned or, where that did not pay, as the closed form left them. After a part that is
    not the last one: as they are, whether that pays or not."""

    groups: Mapping[str, QuantizedGroup]
    report: TuningReport
    training: Training
    """At the end of the part."""


@runtime_checkable
class Tuner(Protocol):
    """Learns what a block's groups store, by the output of the whole block."""

    def tune(self, block: BlockProblem) -> TunedBlock:
        """Groups whose held-out loss, after the last step, is no greater than that of the closed form."""
        ...

    def working_bytes(self, block: BlockSpec, longest: int) -> int:
        """Bytes at most that `tune` holds beside its problem. longest: tokens of the longest sequence."""
        ...
