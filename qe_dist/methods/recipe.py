"""A recipe: a transform, channel lists, a weight quantizer and a compensation, and how a block is fitted with them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qe_dist.core.errors import ConfigError, NumericalError
from qe_dist.core.quantized import QuantizedGroup
from qe_dist.core.scheme import Scheme
from qe_dist.core.spec import BlockSpec, Granularity, view_of
from qe_dist.methods.base import (
    NO_COLUMNS,
    Budget,
    ChoosesChannels,
    Codes,
    Compensation,
    Correction,
    ErrorProblem,
    GroupProblem,
    HasConstraints,
    Quantizer,
    Rotation,
    RoutesTokens,
    Shares,
    TakesOver,
    Transform,
    energy,
)
from qe_dist.methods.block import BlockProblem, TunedBlock, Tuner
from qe_dist.methods.report import with_report
from qe_dist.methods.store import stored
from qe_dist.numerics.allot import allot
from qe_dist.numerics.factors import column_bits, row_scale_bits, store_factor
from qe_dist.numerics.grid import dequantize, round_to_grid, weight_scale
from qe_dist.numerics.stats import GroupStats, Needs

# What is tried, in this order, where the mathematics of a fit fails. After the last step the group is rounded with RTN.
LADDER: tuple[tuple[str, Callable[[GroupProblem], GroupProblem]], ...] = (
    ("as asked", lambda p: p),
    ("float64", lambda p: _in_float64(p)),
    ("float64 and 1% damping", lambda p: _in_float64(_damped(p))),
)


@dataclass(frozen=True)
class Recipe:
    """A complete method: number formats, and one choice on each axis."""

    scheme: Scheme
    transform: Transform
    quantizer: Quantizer
    compensation: Compensation
    budget: Budget = field(default_factory=lambda: Budget(rank=32))
    granularity: Granularity = "group"
    rotation: Rotation | None = None
    channels: ChoosesChannels | None = None
    tuning: Tuner | None = None

    def __post_init__(self) -> None:
        for member in self._members().values():
            if isinstance(member, HasConstraints):
                member.check(self)
        most = self.budget.extra_bits
        if most is not None and self.list_bits > most:
            raise ConfigError(
                f"channels take {self.list_bits:g} bits per weight, which is more than the {most:g} of "
                "budget.extra_bits; lower channels.share or give more bits"
            )

    @property
    def by_modality(self) -> bool:
        """Whether tokens of text and of images are treated differently at run time (`GroupInput.by_modality`)."""
        return self.compensation.by_modality

    @property
    def list_bits(self) -> float:
        """Stored bits of the columns of channel lists, per weight of a wide layer."""
        return 0.0 if self.channels is None else self.channels.bits_per_weight()

    def view(self, block: BlockSpec) -> BlockSpec:
        """The block with the groups that the recipe fits, and what their routers read."""
        read = self.compensation.router_input if isinstance(self.compensation, RoutesTokens) else "sublayer"
        return view_of(block, self.granularity, read)

    def needs(self) -> Needs:
        """The statistics that the recipe's methods ask for together."""
        return self.transform.needs() | self.quantizer.needs() | self.compensation.needs()

    def fit(self, problem: GroupProblem) -> QuantizedGroup:
        """Transforms, rounds and repairs one group, which has the byte budget of a block for itself."""
        return self.fit_block({problem.group.name: problem})[problem.group.name]

    def fit_block(self, problems: Mapping[str, GroupProblem]) -> dict[str, QuantizedGroup]:
        """Fits all groups of a block, by name. `draft` and `settle` of each group may also run on different workers."""
        drafts = {name: self.draft(problem) for name, problem in problems.items()}
        granted = self.grant({name: draft.ask for name, draft in drafts.items()})
        return {name: self.settle(draft, granted[name]) for name, draft in drafts.items()}

    def draft(self, problem: GroupProblem) -> "Draft":
        """Transforms and rounds a group. Repairs it, too, unless the rank depends on what the block's budget grants.
        Where the mathematics fails it takes the steps of LADDER; each is noted in the draft's `fallbacks`."""
        start = time.perf_counter()
        problem = replace(problem, scheme=self.scheme)
        fallbacks = _missing_tokens(problem)
        if problem.stats.num_tokens:
            for name, change in LADDER:
                try:
                    draft = self._attempt(change(problem))
                except (NumericalError, torch.linalg.LinAlgError) as error:
                    fallbacks.append(f"step '{name}' of the ladder failed: {error}")
                    continue
                if name != LADDER[0][0]:
                    fallbacks.append(f"solved by '{name}'")
                return replace(draft, asked=problem, seconds=_since(start), fallbacks=tuple(fallbacks))
        fallbacks.append("RTN without transform and compensation")
        return replace(self._plain(problem), seconds=_since(start), fallbacks=tuple(fallbacks))

    def _attempt(self, problem: GroupProblem) -> "Draft":
        whole = self.transform.fit(problem)
        extracted = NO_COLUMNS if self.channels is None else self.channels.choose(whole)
        moved = whole.without(extracted)  # what a list carries is neither rounded nor repaired
        budget = self.budget.less(column_bits(len(extracted), moved.num_outputs, 16), moved)
        before = Draft(problem, ErrorProblem(moved, {}, budget, whole=whole), {}, extracted)
        exempt = self.compensation.exempt(moved).to(moved.stats.importance.device)
        if budget.extra_bits is None or not exempt.numel():
            return self._drafted(before, exempt)
        # Bytes may buy less than whole columns take: no more of them than ranks, and none where that leaves less.
        carried = exempt[: budget.rank_for(moved.num_outputs, moved.group.in_features)]
        tried = [self._drafted(before, columns) for columns in (carried, NO_COLUMNS)]
        return min(tried, key=lambda draft: draft.left)

    def _drafted(self, before: "Draft", exempt: Tensor) -> "Draft":
        """`before` with codes and, unless the rank waits for a grant, a repair. exempt: columns rounded as zero."""
        moved, budget = before.repair.problem, before.repair.budget
        weights = moved.weights
        if isinstance(self.compensation, TakesOver):
            weights = self.compensation.left_to_round(moved, budget)
        if exempt.numel():
            weights = {n: w.index_fill(1, exempt, 0.0) for n, w in weights.items()}
        codes = self._rounded(weights, moved.stats)
        errors = {n: w - dequantize(codes[n].codes, codes[n].scale, w.dtype) for n, w in moved.weights.items()}
        repair = replace(before.repair, errors=errors)
        draft = replace(before, repair=repair, codes=codes)
        if self.budget.extra_bits is not None and isinstance(self.compensation, Shares):
            return replace(draft, gains=self.compensation.gains(repair))
        return replace(draft, correction=self._repaired(repair))

    def _rounded(self, weights: Mapping[str, Tensor], stats: GroupStats) -> dict[str, Codes]:
        """Codes of all linears of a group, rounded in one call so that work on the Gram matrix is done once."""
        found = self.quantizer.fit(torch.cat(list(weights.values())), stats, self.scheme)
        sizes = [len(w) for w in weights.values()]
        parts = zip(weights, found.codes.split(sizes), found.scale.split(sizes), strict=True)
        return {n: Codes(codes, scale.clone()) for n, codes, scale in parts}

    def _plain(self, problem: GroupProblem) -> "Draft":
        bits, size = self.scheme.weight_bits, self.scheme.group_size
        scales = {n: weight_scale(w, bits, size) for n, w in problem.weights.items()}
        codes = {n: Codes(round_to_grid(w, scales[n], bits), scales[n]) for n, w in problem.weights.items()}
        return Draft(problem, ErrorProblem(problem, {}, self.budget, whole=problem), codes)

    def _repaired(self, repair: ErrorProblem) -> Correction:
        correction = self.compensation.fit(repair)
        if not correction.is_finite:
            raise NumericalError("the compensation has a NaN or Inf")
        return correction

    def grant(self, asks: Mapping[str, "Ask | None"]) -> dict[str, int | None]:
        """The rank of each group of a block under the block's byte budget: the next rank goes where it removes most
        error per stored bit. None for a group that does not ask."""
        asking = {name: ask for name, ask in asks.items() if ask is not None}
        factor_bits = self.budget.factor_bits
        scale_bits = row_scale_bits(factor_bits)
        spare = sum(a.bits - scale_bits * a.outputs for a in asking.values())
        step = 2 if factor_bits == 4 else 1  # directions that share their bytes, see `even_rank`
        costs = [float(step * (factor_bits * (a.outputs + a.inputs) + scale_bits)) for a in asking.values()]
        gains = [_in_steps(a.gains, step) for a in asking.values()]
        steps = dict(zip(asking, allot(gains, costs, float(spare)), strict=True))
        return {name: step * steps[name] if name in steps else None for name in asks}

    def settle(self, draft: "Draft", granted: int | None) -> QuantizedGroup:
        """The stored form of a drafted group. granted: rank of the repair that is still to be fitted, if any."""
        start = time.perf_counter()
        if granted is not None:
            try:
                draft = replace(draft, correction=self._repaired(replace(draft.repair, granted=granted)))
            except (NumericalError, torch.linalg.LinAlgError) as error:
                draft = replace(draft, fallbacks=(*draft.fallbacks, f"no repair of rank {granted}: {error}"))
        correction = draft.correction
        if draft.extracted.numel():
            correction = replace(correction, extracted=draft.extracted)
        group = stored(draft.repair.whole or draft.asked, draft.codes, correction, self.budget.factor_bits)
        return with_report(group, draft.asked, draft.seconds + _since(start), draft.fallbacks)

    def tune(self, block: BlockProblem) -> TunedBlock:
        """Tunes a block whose groups are settled, and measures what has changed."""
        start = time.perf_counter()
        assert self.tuning is not None, "this recipe tunes nothing"
        tuned = self.tuning.tune(block)
        if tuned.groups is block.groups:
            return tuned
        share = _since(start) / len(block.groups)

        def reported(name: str, group: QuantizedGroup) -> QuantizedGroup:
            before = block.groups[name].report
            assert before is not None, "settled groups have a report"
            return with_report(group, block.problems[name], before.seconds + share, before.fallbacks)

        return replace(tuned, groups={name: reported(name, group) for name, group in tuned.groups.items()})

    def _members(self) -> dict[str, Any]:
        """The choice on each axis that has one."""
        axes = ("transform", "quantizer", "compensation", "channels", "rotation", "tuning")
        return {axis: getattr(self, axis) for axis in axes if getattr(self, axis) is not None}

    def describe(self) -> dict[str, Any]:
        """The recipe as plain data: what identifies a run, and what goes into the manifest."""
        axes = {a: {"name": type(m).__module__.rsplit(".", 1)[1], **vars(m)} for a, m in self._members().items()}
        return {
            "scheme": str(self.scheme),
            **axes,
            "budget": dict(vars(self.budget)),
            "granularity": self.granularity,
        }


@dataclass(frozen=True)
class Draft:
    """A group that is rounded, but not yet stored. Its repair may wait for the rank that the block grants."""

    asked: GroupProblem
    """The problem before any transform."""
    repair: ErrorProblem
    codes: Mapping[str, Codes]
    extracted: Int[Tensor, " C"] = NO_COLUMNS
    """Channels that a list takes off the activation grid for every token."""
    correction: Correction = field(default_factory=Correction)
    gains: Float[Tensor, " R"] | None = None
    seconds: float = 0.0
    fallbacks: tuple[str, ...] = ()

    @property
    def left(self) -> float:
        """Squared error of the outputs, by the Gram matrix, with the codes and the shared low-rank pair as they are
        stored. The rounding of activations is not counted."""
        bits, error, c = self.repair.budget.factor_bits, self.repair.stacked, self.correction.with_even_ranks()
        if c.extracted is not None:
            error = error.index_fill(1, c.extracted, 0.0)
        if c.shared is not None and c.shared.up.numel():
            up, down = (store_factor(factor, bits).dense.to(error) for factor in (c.shared.up, c.shared.down))
            error = error - up @ down
        return float(energy(error, self.repair.stats.total_gram.to(error)).sum())

    @property
    def ask(self) -> "Ask | None":
        """What the group reports for sharing the budget of its block; None where its repair has a rank already."""
        if self.gains is None:
            return None
        problem = self.repair.problem
        bits = (self.repair.budget.extra_bits or 0.0) * problem.num_weights
        return Ask(self.gains.cpu(), problem.num_outputs, problem.group.in_features, bits)


@dataclass(frozen=True)
class Ask:
    """What a group reports so that the block's budget can be shared; small enough to send between workers."""

    gains: Float[Tensor, " R"]
    """Squared error that each further rank removes."""
    outputs: int
    inputs: int
    bits: float
    """The group's part of the block's budget in bits, minus what its channel lists take."""


def _since(start: float) -> float:
    return time.perf_counter() - start


def _in_steps(gains: Tensor, step: int) -> Tensor:
    """Sums of the gains of `step` ranks at a time; ranks at the end that do not fill a step are dropped."""
    return gains[: len(gains) // step * step].view(-1, step).sum(dim=1)


def _missing_tokens(problem: GroupProblem) -> list[str]:
    bad = problem.stats.nonfinite
    if not bad:
        return []
    total = bad + problem.stats.num_tokens
    return [f"{bad} of {total} tokens have a NaN or Inf at this input and were left out"]


def _in_float64(problem: GroupProblem) -> GroupProblem:
    stats = problem.stats
    sample = replace(stats.sample, x=stats.sample.x.double())
    gram = None if stats.gram is None else stats.gram.double()
    weights = {n: w.double() for n, w in problem.weights.items()}
    return replace(problem, weights=weights, stats=replace(stats, gram=gram, sample=sample))


def _damped(problem: GroupProblem) -> GroupProblem:
    gram = problem.stats.gram
    if gram is None:
        return problem
    ridge = 0.01 * gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return replace(problem, stats=replace(problem.stats, gram=gram + ridge[:, None, None] * eye))
