"""What transforms, quantizers and compensations are given, and what they must offer (docs/how/adding-a-method.md)."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from qe_dist.core.batch import TEXT
from qe_dist.core.determinism import tensor_cores
from qe_dist.core.errors import ConfigError
from qe_dist.core.rotation import Space
from qe_dist.core.scheme import Scheme
from qe_dist.core.spec import InputGroup, RouterInput
from qe_dist.numerics.factors import FACTOR_BITS, even_rank, pair_bits, rank_within
from qe_dist.numerics.hadamard import Orthogonal, Signs
from qe_dist.numerics.lowrank import capped
from qe_dist.numerics.stats import GroupStats, Needs


@dataclass(frozen=True)
class GroupProblem:
    """What a method is given of one input group, in the coordinates x~ = x H / input_scale. Tensors are float32."""

    group: InputGroup
    weights: Mapping[str, Float[Tensor, "_ I"]]
    stats: GroupStats
    scheme: Scheme
    seed: int = 0
    input_scale: Float[Tensor, "M I"] | None = None
    rotation: Signs = ()
    """Hadamard factors of H. Weights and statistics are in the rotated coordinates already."""

    def rescaled(self, scale: Float[Tensor, "*M I"]) -> "GroupProblem":
        """The same function in new coordinates: inputs divided by `scale`, weights multiplied by it.

        With a scale per modality the weights take that of text: the function is the same for text only, and
        `ErrorProblem.error_of` counts what the others miss. The scale is rounded to the bf16 in which it is stored
        before anything uses it.
        """
        scale = scale.bfloat16().float().view(-1, scale.shape[-1])
        return replace(
            self,
            weights={n: w * scale[TEXT].to(w) for n, w in self.weights.items()},
            stats=self.stats.rescaled(scale),
            input_scale=scale,
        )

    def without(self, channels: Int[Tensor, " C"]) -> "GroupProblem":
        """The group with weights and activation statistics of these channels set to zero; the Gram matrix is kept."""
        if not channels.numel():
            return self
        channels = channels.to(self.stats.importance.device)
        weights = {n: w.index_fill(1, channels, 0.0) for n, w in self.weights.items()}
        return replace(self, weights=weights, stats=self.stats.without(channels))

    @property
    def num_weights(self) -> int:
        """The number of weights of all linears of the group."""
        return sum(w.numel() for w in self.weights.values())

    @property
    def num_outputs(self) -> int:
        """The number of outputs of all linears of the group."""
        return sum(w.shape[0] for w in self.weights.values())


@dataclass(frozen=True)
class Codes:
    """A rounded weight: integer codes, and one scale per output and scale group."""

    codes: Int8[Tensor, "O I"]
    scale: Float[Tensor, "O G"]


@dataclass(frozen=True)
class Budget:
    """How large a compensation may be: exactly one of a rank, a ratio of the width, and stored bits per weight."""

    rank: int | None = None
    extra_bits: float | None = None
    """Stored bits per weight of everything beside the codes: factors and the columns of channel lists together."""
    factor_bits: int = 16
    """Bits of each number of a low-rank factor: 16, 8 or 4."""
    ratio: float | None = None
    """Rank as a share of the smaller dimension of a group's stacked weights, at least LEAST_RANK (MASQuant's code)."""
    capped: bool = False
    """Whether a layer narrower than any published one gets the same share of its width instead of the whole rank
    (`numerics.lowrank.capped`), as named recipes have it. A rank that a user asks for is taken as it is."""

    def __post_init__(self) -> None:
        if sum(size is not None for size in (self.rank, self.extra_bits, self.ratio)) != 1:
            raise ConfigError("a budget is a rank, a ratio or extra_bits, exactly one of them")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"budget.rank must be at least 1, found {self.rank}")
        if self.extra_bits is not None and not 0 < self.extra_bits < float("inf"):
            raise ConfigError(f"budget.extra_bits must be positive and finite, found {self.extra_bits}")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ConfigError(f"budget.ratio must lie in 0..1 and be more than 0, found {self.ratio}")
        if self.capped and self.rank is None:
            raise ConfigError("budget.capped is for a rank; other budgets are in proportion to a layer as they are")
        if self.factor_bits not in FACTOR_BITS:
            raise ConfigError(f"budget.factor_bits must be 4, 8 or 16, found {self.factor_bits}")

    def rank_for(self, outputs: int, width: int) -> int:
        """The rank that one adapter of a group with so many outputs and input channels may have."""
        if self.rank is not None:
            return capped(width, self.rank) if self.capped else min(self.rank, outputs, width)
        if self.ratio is not None:
            return min(max(LEAST_RANK, int(self.ratio * min(outputs, width))), outputs, width)
        assert self.extra_bits is not None
        return rank_within(self.extra_bits * outputs * width, outputs, width, self.factor_bits)

    def pair_bytes(self, outputs: int, width: int) -> int:
        """Stored bytes at most of one low-rank pair [outputs, width]."""
        if self.extra_bits is not None:
            return int(self.extra_bits * outputs * width / 8)
        return pair_bits(self.rank_for(outputs, width), outputs, width, self.factor_bits) // 8

    def less(self, bits: int, problem: GroupProblem) -> "Budget":
        """The budget after so many stored bits of the group are spent, never quite zero. A budget by rank stays."""
        if self.extra_bits is None or not bits:
            return self
        return replace(self, extra_bits=max(1e-9, self.extra_bits - bits / problem.num_weights))


NO_COLUMNS = torch.zeros(0, dtype=torch.int64)

LEAST_RANK = 32
"""The least rank that a budget by ratio gives."""

SPREAD = 4
"""A group gets at most so many times the rank of an even share of its block's budget, which bounds the work."""


@dataclass(frozen=True)
class ErrorProblem:
    """What a compensation is given: the rounding errors of a group, and the budget for their repair."""

    problem: GroupProblem
    """The group without the channels that a list carries."""
    errors: Mapping[str, Float[Tensor, "_ I"]]
    """W minus the dequantized codes. Exempted columns, and what a method took over before rounding, are in it whole."""
    budget: Budget
    granted: int | None = None
    """The rank that the group was granted out of its block's shared budget; None where nothing is shared."""
    whole: GroupProblem | None = None
    """The group with the channels that a list carries; None where no list carries any."""

    @property
    def stats(self) -> GroupStats:
        """The statistics of the group without the channels that a list carries."""
        return self.problem.stats

    @property
    def rank(self) -> int:
        """The rank that the repair may have: what was granted, or what the budget gives to the group alone."""
        if self.granted is not None:
            return self.granted
        return self.budget.rank_for(self.problem.num_outputs, self.problem.group.in_features)

    @property
    def most_rank(self) -> int:
        """The largest rank that the group may be granted out of its block's budget."""
        return SPREAD * self.rank

    def gains(self, down: Float[Tensor, "R I"]) -> Float[Tensor, " R"]:
        """Squared output error that each direction of an adapter with orthonormal `up` removes, relative to the squared
        output of the group."""
        gram = self.stats.total_gram.to(down.dtype)
        weight = torch.cat(list((self.whole or self.problem).weights.values()))
        return energy(down, gram) / energy(weight, gram).sum().clamp_min(torch.finfo(down.dtype).tiny)

    @property
    def stacked(self) -> Float[Tensor, "O I"]:
        """The errors of all linears of the group, one above the other."""
        return torch.cat(list(self.errors.values()))

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the errors: float32, or float64 where LADDER asks for it."""
        return next(iter(self.errors.values())).dtype

    def error_of(self, modality: int) -> Float[Tensor, "O I"]:
        """The weight error that tokens of one modality meet; not `stacked` where they have a scale of their own."""
        scale = self.problem.input_scale
        if scale is None or len(scale) == 1:
            return self.stacked
        weight = torch.cat(list(self.problem.weights.values()))
        return self.stacked + weight * (scale[modality] / scale[TEXT] - 1).to(weight)


def energy(rows: Float[Tensor, "R I"], gram: Float[Tensor, "I I"]) -> Float[Tensor, " R"]:
    """Sum over all inputs x of (row . x)^2, for each row. gram: X^T X of the inputs."""
    with tensor_cores():
        return (rows @ gram).mul_(rows).sum(dim=1)


@dataclass(frozen=True)
class LowRank:
    """A low-rank pair: (x~ down^T) up^T is added to the outputs of all linears of a group, which are stacked."""

    up: Float[Tensor, "*experts O R"]
    down: Float[Tensor, "*experts R I"]


@dataclass(frozen=True)
class Experts(LowRank):
    """Low-rank pairs of which every token uses one at most; their number is the first dimension of each tensor."""

    router: Float[Tensor, "E H"] | None = None
    """Chooses the expert. None: the modality does, no expert for text and the first for images."""
    channels: Int[Tensor, "E D"] | None = None
    """Input channels that an expert extracts for its tokens, besides those that are extracted for every token."""


@dataclass(frozen=True)
class SalientColumns:
    """A second term of the weight, for input channels that stay on the activation grid."""

    channels: Int[Tensor, " S"]
    columns: Float[Tensor, "O S"]


@dataclass(frozen=True)
class Correction:
    """The repair of a whole group, as it is fitted. `methods.store.stored` rounds it to the form on disk."""

    shared: LowRank | None = None
    """Low-rank pair for every token."""
    experts: Experts | None = None
    extracted: Int[Tensor, " C"] | None = None
    """Input channels that leave the activation grid for every token, and are multiplied with their columns of W in 16
    bits. The columns are taken when the group is stored."""
    salient: SalientColumns | None = None

    @property
    def is_finite(self) -> bool:
        """Whether no tensor has a NaN or Inf."""
        parts = (self.shared, self.experts, self.salient)
        tensors = (t for part in parts if part is not None for t in vars(part).values() if t is not None)
        return all(bool(torch.isfinite(t).all()) for t in tensors)

    def with_even_ranks(self) -> "Correction":
        """The same repair, with zeros added to the low-rank pairs of odd rank."""
        shared, experts = self.shared, self.experts
        if shared is not None:
            shared = LowRank(*even_rank(shared.up, shared.down))
        if experts is not None:
            experts = Experts(*even_rank(experts.up, experts.down), experts.router, experts.channels)
        return replace(self, shared=shared, experts=experts)

    def of_rows(self, rows: slice) -> "Correction":
        """The part of one linear, whose outputs these are."""
        shared = self.shared and replace(self.shared, up=self.shared.up[rows])
        experts = self.experts and replace(self.experts, up=self.experts.up[:, rows])
        salient = self.salient and replace(self.salient, columns=self.salient.columns[rows])
        return replace(self, shared=shared, experts=experts, salient=salient)


@runtime_checkable
class ChoosesChannels(Protocol):
    """Lists input channels that leave the activation grid for every token, from the token sample."""

    def bits_per_weight(self) -> float:
        """Stored bits of the columns, per weight of a wide layer."""
        ...

    def choose(self, problem: GroupProblem) -> Int[Tensor, " C"]:
        """Their columns are stored in 16 bits and leave the codes."""
        ...


@runtime_checkable
class Transform(Protocol):
    """Scales the input and, inversely, the weight, so that their product stays the same."""

    def needs(self) -> Needs:
        """The statistics that it reads."""
        ...

    def fit(self, problem: GroupProblem) -> GroupProblem:
        """The problem in new coordinates (`GroupProblem.rescaled`)."""
        ...


@runtime_checkable
class Quantizer(Protocol):
    """Rounds the weights of a group."""

    def needs(self) -> Needs:
        """The statistics that it reads."""
        ...

    def fit(self, weight: Float[Tensor, "O I"], stats: GroupStats, scheme: Scheme) -> Codes:
        """Codes and scales of the weight in the number format of the scheme; each row is rounded by itself."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """A quantizer that cannot afford every layer."""

    def check_layer(self, name: str, inputs: int) -> None:
        """Raises ConfigError that names the layer, its inputs and the way out. Before anything is computed."""
        ...


@runtime_checkable
class Compensation(Protocol):
    """Repairs the error of rounding within a budget. Methods inherit from it and replace the defaults they need to."""

    by_modality: ClassVar[bool] = False
    """Whether it treats tokens of text and of images differently at run time."""
    tunable: ClassVar[bool] = False
    """Whether it stores one adapter for every token or nothing, which a tuner can go on learning."""

    @abstractmethod
    def needs(self) -> Needs:
        """The statistics that the pass over the calibration gathers for it."""
        ...

    @abstractmethod
    def fit(self, problem: ErrorProblem) -> Correction:
        """The repair. Raises NumericalError where the mathematics fails."""
        ...

    def exempt(self, problem: GroupProblem) -> Int[Tensor, " C"]:
        """Input channels whose columns it carries itself, so that they are rounded as zero. The most useful come first:
        a byte budget may be too small for all of them, or for any."""
        return NO_COLUMNS

    @abstractmethod
    def most_bytes(self, outputs: int, width: int, router_width: int, budget: Budget) -> int:
        """Stored bytes at most of what it adds to a group with so many outputs and input channels. router_width: of the
        tensor that a router would read. Groups that share the byte budget of their block (`Shares`) keep to the sum."""
        ...

    @abstractmethod
    def working_floats(self, outputs: int, width: int, sample_tokens: int, budget: Budget) -> int:
        """Float32 numbers at most that `gains` and `fit` hold at once, beside the problem that they are given."""
        ...


@runtime_checkable
class Shares(Protocol):
    """A compensation whose rank is free. Under a byte budget the groups of a block share the bytes: each further rank
    goes to the group where it removes most error."""

    def gains(self, problem: ErrorProblem) -> Float[Tensor, " R"]:
        """Squared error that each further rank removes, relative to the squared output, in descending order."""
        ...


@runtime_checkable
class RoutesTokens(Protocol):
    """A compensation whose expert a router chooses for each token."""

    router_input: RouterInput
    """sublayer: a group behind a row-parallel cut routes on the input of its sublayer, which every rank has. own: every
    group routes on the tensor that it reads, of which a rank has only a part there."""


@runtime_checkable
class TakesOver(Protocol):
    """A compensation that takes a part of the weights over before the rest is rounded."""

    def left_to_round(self, problem: GroupProblem, budget: Budget) -> Mapping[str, Float[Tensor, "_ I"]]:
        """The weights, by linear, minus the part that the compensation stores itself."""
        ...


@runtime_checkable
class Rotation(Protocol):
    """Rewrites the whole model, before anything is measured, into one that computes the same; where nothing in front of
    an input can take the rotation, it is done at run time."""

    def bases(self, widths: Mapping[Space, int], gains: Float[Tensor, "L N"]) -> Mapping[Space, Orthogonal]:
        """The orthogonal matrix of every space, to be fused into the weights. gains: the weights of all norms of the
        residual stream."""
        ...

    def at_run_time(self, group: InputGroup, ranks: int) -> Signs:
        """Hadamard factors of the rotation of a group's input that cannot be fused; empty for none.

        ranks: tensor-parallel ranks among which the input is cut. No block of the rotation is on two of them.
        """
        ...


@runtime_checkable
class HasConstraints(Protocol):
    """A method that cannot be combined with every method of the other axes."""

    def check(self, recipe: Any) -> None:
        """Raises ConfigError that names the two parts that clash, and what would work. recipe: a `Recipe`."""
        ...
