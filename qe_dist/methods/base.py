"""How the three choices of a recipe meet: transform x weight quantizer x compensation (DESIGN section 2)."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from qe_dist.core.batch import MODALITIES, TEXT
from qe_dist.core.errors import ConfigError, NumericalError
from qe_dist.core.quantized import (
    Factor,
    FitReport,
    GroupInput,
    QuantizedGroup,
    QuantizedLinear,
    all_finite,
    input_tensors,
    num_bytes,
    repair_tensors,
)
from qe_dist.core.scheme import Scheme
from qe_dist.core.spec import Granularity, InputGroup
from qe_dist.numerics.factors import rank_within, store_factor
from qe_dist.numerics.grid import dequantize, round_to_grid, weight_scale
from qe_dist.numerics.lowrank import capped
from qe_dist.numerics.packing import num_words
from qe_dist.numerics.reference import linear_forward, prepare, route
from qe_dist.numerics.stats import GroupStats, Needs


@dataclass(frozen=True)
class GroupProblem:
    """What a method gets to see of one input group, in the coordinates x~ = x / input_scale. float32."""

    group: InputGroup
    weights: Mapping[str, Float[Tensor, "_ I"]]
    stats: GroupStats
    scheme: Scheme
    seed: int = 0
    input_scale: Float[Tensor, "M I"] | None = None

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

    @property
    def num_weights(self) -> int:
        return sum(w.numel() for w in self.weights.values())


@dataclass(frozen=True)
class Codes:
    codes: Int8[Tensor, "O I"]
    scale: Float[Tensor, "O G"]


@dataclass(frozen=True)
class Budget:
    """Size of a compensation: a rank, or stored bits per weight that are turned into a rank."""

    rank: int | None = None
    extra_bits: float | None = None
    factor_bits: int = 16

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.extra_bits is None):
            raise ConfigError("a budget is either a rank or extra_bits, exactly one of them")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"budget.rank must be at least 1, found {self.rank}")
        if self.extra_bits is not None and not 0 < self.extra_bits < float("inf"):
            raise ConfigError(f"budget.extra_bits must be positive and finite, found {self.extra_bits}")
        if self.factor_bits not in (8, 16):
            raise ConfigError(f"budget.factor_bits must be 8 or 16, found {self.factor_bits}")

    def rank_for(self, problem: GroupProblem) -> int:
        """The rank that one adapter for the group may have (see `capped` for narrow layers)."""
        width = problem.group.in_features
        if self.rank is not None:
            return capped(width, self.rank)
        assert self.extra_bits is not None
        bits = self.extra_bits * problem.num_weights
        return rank_within(bits, problem.num_weights // width, width, self.factor_bits)


@dataclass(frozen=True)
class ErrorProblem:
    """What is left to repair after rounding."""

    problem: GroupProblem
    errors: Mapping[str, Float[Tensor, "_ I"]]
    """W - Q(W), with exempted columns entirely in it."""
    budget: Budget

    @property
    def stats(self) -> GroupStats:
        return self.problem.stats

    @property
    def rank(self) -> int:
        return self.budget.rank_for(self.problem)

    @property
    def stacked(self) -> Float[Tensor, "O I"]:
        return torch.cat(list(self.errors.values()))

    @property
    def output_sizes(self) -> list[int]:
        return [e.shape[0] for e in self.errors.values()]

    def error_of(self, modality: int) -> Float[Tensor, "O I"]:
        """What Q(W) misses for tokens of one modality: `stacked`, but where these have a scale of their own."""
        scale = self.problem.input_scale
        if scale is None or len(scale) == 1:
            return self.stacked
        weight = torch.cat(list(self.problem.weights.values()))
        return self.stacked + weight * (scale[modality] / scale[TEXT] - 1).to(weight)


@dataclass(frozen=True)
class Correction:
    """A repair for a whole group; `up` matrices have the outputs of all its linears stacked."""

    shared_down: Float[Tensor, "R I"] | None = None
    shared_up: Float[Tensor, "O R"] | None = None
    shared_channels: Int[Tensor, " C"] | None = None
    expert_down: Float[Tensor, "E S I"] | None = None
    expert_up: Float[Tensor, "E O S"] | None = None
    expert_channels: Int[Tensor, "E D"] | None = None
    router: Float[Tensor, "E H"] | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in vars(self).items() if v is not None}


@runtime_checkable
class Transform(Protocol):
    """Moves the input and, inversely, the weight, so that their product stays the same."""

    def needs(self) -> Needs: ...
    def fit(self, problem: GroupProblem) -> GroupProblem: ...


@runtime_checkable
class Quantizer(Protocol):
    """Rounds one weight."""

    def needs(self) -> Needs: ...
    def fit(self, weight: Tensor, stats: GroupStats, scheme: Scheme) -> Codes: ...


@runtime_checkable
class Compensation(Protocol):
    """Repairs the error of rounding within a budget."""

    def needs(self) -> Needs: ...
    def exempt(self, problem: GroupProblem) -> Int[Tensor, " C"]:
        """Columns it carries itself, which are rounded as zero."""
        ...

    def fit(self, problem: ErrorProblem) -> Correction: ...


@runtime_checkable
class Choosy(Protocol):
    """A member of any axis that does not go with all of the others."""

    def check(self, recipe: "Recipe") -> None:
        """Raises ConfigError that names the two parts that clash, and what would work."""
        ...


NO_COLUMNS = torch.zeros(0, dtype=torch.int64)

# The ladder of DESIGN section 8.1. Each step changes the problem a little more; the last gives up the repair.
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

    def __post_init__(self) -> None:
        for member in (self.transform, self.quantizer, self.compensation):
            if isinstance(member, Choosy):
                member.check(self)

    def needs(self) -> Needs:
        return self.transform.needs() | self.quantizer.needs() | self.compensation.needs()

    def fit(self, problem: GroupProblem) -> QuantizedGroup:
        """Transform, round, repair; climbs the ladder where the mathematics fails, and says so."""
        start = time.perf_counter()
        fallbacks = _missing_tokens(problem)
        if problem.stats.num_tokens:
            for name, change in LADDER:
                try:
                    group = self._attempt(change(problem))
                except (NumericalError, torch.linalg.LinAlgError) as error:
                    fallbacks.append(f"step '{name}' of the ladder failed: {error}")
                    continue
                if name != LADDER[0][0]:
                    fallbacks.append(f"solved by '{name}'")
                return _with_report(group, problem, start, fallbacks)
        fallbacks.append("plain rounding without transform and compensation")
        return _with_report(self._plain(problem), problem, start, fallbacks)

    def _attempt(self, problem: GroupProblem) -> QuantizedGroup:
        moved = self.transform.fit(problem)
        exempt = self.compensation.exempt(moved).to(moved.stats.importance.device)
        weights = {n: w.index_fill(1, exempt, 0.0) for n, w in moved.weights.items()}
        codes = {n: self.quantizer.fit(w, moved.stats, self.scheme) for n, w in weights.items()}
        errors = {n: w - dequantize(codes[n].codes, codes[n].scale, w.dtype) for n, w in moved.weights.items()}
        correction = self.compensation.fit(ErrorProblem(moved, errors, self.budget))
        if not all_finite(correction.tensors()):
            raise NumericalError("the compensation has a NaN or Inf")
        return self._store(moved, codes, correction)

    def _plain(self, problem: GroupProblem) -> QuantizedGroup:
        bits, size = self.scheme.weight_bits, self.scheme.group_size
        scales = {n: weight_scale(w, bits, size) for n, w in problem.weights.items()}
        codes = {n: Codes(round_to_grid(w, scales[n], bits), scales[n]) for n, w in problem.weights.items()}
        return self._store(problem, codes, Correction())

    def _store(self, moved: GroupProblem, codes: Mapping[str, Codes], c: Correction) -> QuantizedGroup:
        """Rounds the factors to their stored form, then takes the columns of extracted channels, which make up
        for whatever those factors contribute there: extraction is exact up to bf16."""
        bits = self.budget.factor_bits
        expert_down = c.expert_down
        if expert_down is not None and c.shared_channels is not None:  # the shared columns are all of W there
            expert_down = expert_down.index_fill(2, c.shared_channels, 0.0)
        shared_down, expert_down = _stored(c.shared_down, bits), _stored(expert_down, bits)
        sizes = [w.shape[0] for w in moved.weights.values()]
        ups = zip(_rows(c.shared_up, sizes, 0), _rows(c.expert_up, sizes, 1), strict=True)
        linears = {}
        for (name, weight), (shared_rows, expert_rows) in zip(moved.weights.items(), ups, strict=True):
            shared_up, expert_up = _stored(shared_rows, bits), _stored(expert_rows, bits)
            shared, own = _pair(shared_up, shared_down), _pair(expert_up, expert_down)
            linears[name] = QuantizedLinear(
                codes=codes[name].codes,
                scale=codes[name].scale,
                shared_up=shared_up,
                shared_columns=None if c.shared_channels is None else _columns(weight, c.shared_channels, shared),
                expert_up=expert_up,
                expert_columns=None
                if c.expert_channels is None
                else _expert_columns(weight, c.expert_channels, shared, own),
            )
        part = GroupInput(
            input_scale=_bf16(moved.input_scale),
            shared_down=shared_down,
            shared_channels=_int32(c.shared_channels),
            expert_down=expert_down,
            expert_channels=_int32(c.expert_channels),
            router=_bf16(c.router),
        )
        return QuantizedGroup(self.scheme, part, linears)

    def describe(self) -> dict[str, Any]:
        """The recipe as plain data: what identifies a run, and what goes into the manifest."""
        members = {a: getattr(self, a) for a in ("transform", "quantizer", "compensation")}
        axes = {a: {"name": type(m).__module__.rsplit(".", 1)[1], **vars(m)} for a, m in members.items()}
        return {
            "scheme": str(self.scheme),
            **axes,
            "budget": dict(vars(self.budget)),
            "granularity": self.granularity,
        }


def _stored(matrix: Tensor | None, bits: int) -> Factor | None:
    """None for a rank of zero too, which a small byte budget may give."""
    return None if matrix is None or matrix.numel() == 0 else store_factor(matrix, bits)


Pairs = list[tuple[Tensor, Tensor]]


def _pair(up: Factor | None, down: Factor | None) -> Pairs:
    """(up, down) as matrices, or nothing."""
    return [] if up is None or down is None else [(up.dense, down.dense)]


def _columns(weight: Tensor, channels: Tensor, pairs: Pairs) -> Tensor:
    """What an extracted channel is multiplied with: its column, less what low-rank pairs add there. [O, C]"""
    columns = weight[:, channels]
    for up, down in pairs:
        columns = columns - up @ down[:, channels]
    return columns.to(torch.bfloat16)


def _expert_columns(weight: Tensor, channels: Tensor, shared: Pairs, own: Pairs) -> Tensor:
    """[E, O, C]"""
    own_of = [[(up[e], down[e]) for up, down in own] for e in range(len(channels))]
    return torch.stack([_columns(weight, channels[e], shared + own_of[e]) for e in range(len(channels))])


def _rows(stacked: Tensor | None, sizes: list[int], dim: int) -> tuple[Tensor | None, ...]:
    return (None,) * len(sizes) if stacked is None else stacked.split(sizes, dim=dim)


def _bf16(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.bfloat16)


def _int32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.int32)


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


def _with_report(group: QuantizedGroup, problem: GroupProblem, start: float, fallbacks: list[str]) -> QuantizedGroup:
    """Measures the stored group on the token sample against the full-precision linears."""
    sample = problem.stats.sample
    x, modality = sample.x.float(), sample.modality
    expert = route(group.input, sample.router_x, modality)
    repaired = prepare(group.input, x, expert, group.scheme.act_bits, modality)
    bare_input = GroupInput(input_scale=group.input.input_scale)
    bare = prepare(bare_input, x, None, group.scheme.act_bits, modality)
    exact, wrong, rounded = (torch.zeros(x.shape[0], dtype=torch.float64) for _ in range(3))
    tensors = input_tensors(group.input)
    size = num_bytes(tensors)
    for name, linear in group.linears.items():
        y = x @ problem.weights[name].float().T
        plain = replace(linear, shared_up=None, shared_columns=None, expert_up=None, expert_columns=None)
        exact += y.square().sum(1, dtype=torch.float64).cpu()
        wrong += (y - linear_forward(linear, repaired)).square().sum(1, dtype=torch.float64).cpu()
        rounded += (y - linear_forward(plain, bare)).square().sum(1, dtype=torch.float64).cpu()
        columns = linear.codes.shape[1]
        words = linear.codes.shape[0] * num_words(columns, group.scheme.weight_bits)
        size += 4 * words + num_bytes({"scale": linear.scale, **repair_tensors(linear)})

    def relative(error: Tensor, rows: Tensor | slice) -> float:
        return float((error[rows].sum() / exact[rows].sum().clamp_min(1e-300)).sqrt())

    by_modality = {
        name: relative(wrong, (modality == m).cpu()) for m, name in enumerate(MODALITIES) if bool((modality == m).any())
    }
    report = FitReport(
        error=relative(wrong, slice(None)) if x.shape[0] else None,
        error_by_modality=by_modality,
        rounding_error=relative(rounded, slice(None)) if x.shape[0] else None,
        bytes=size,
        seconds=time.perf_counter() - start,
        fallbacks=tuple(fallbacks),
    )
    return replace(group, report=report)
