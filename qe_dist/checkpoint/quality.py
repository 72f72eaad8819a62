"""What an evaluation found, sample by sample, and what it amounts to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from qe_dist.core.batch import MODALITIES
from qe_dist.numerics.intervals import FEWEST, Interval, interval

PLAIN_TEXT = "text"
"""The kind of samples that are no questions: there is no answer to be exact about."""


@dataclass(frozen=True)
class SampleScore:
    """Sums over the predicted tokens of one sample."""

    index: int
    kind: str
    modality: str
    """`image` where the sample has an image, else `text`: what the predicted tokens could look at."""
    tokens: int
    exact: bool
    """Whether every token is the most likely one, so that greedy decoding would give the answer."""
    nll: float
    kl: float | None
    agreed: int | None
    """Tokens where model and reference think the same token the most likely."""


@dataclass(frozen=True)
class Measure:
    """A number that is a function of two sums over samples."""

    value: Callable[[SampleScore], float]
    weight: Callable[[SampleScore], float]
    of_ratio: Callable[[Tensor], Tensor] = torch.clone

    def known(self, scores: Sequence[SampleScore]) -> list[SampleScore]:
        """Those of the samples that it says something about."""
        return [score for score in scores if self.weight(score)]

    def columns(self, scores: Sequence[SampleScore]) -> tuple[Tensor, Tensor]:
        """Sums and weights of the samples. [S], [S]"""
        values = torch.tensor([self.value(score) for score in scores], dtype=torch.float64)
        return values, torch.tensor([self.weight(score) for score in scores], dtype=torch.float64)


MEASURES: Mapping[str, Measure] = {
    "accuracy": Measure(lambda s: s.exact, lambda s: s.kind != PLAIN_TEXT),
    "perplexity": Measure(lambda s: s.nll, lambda s: s.tokens, torch.exp),
    "kl": Measure(lambda s: s.kl or 0.0, lambda s: 0 if s.kl is None else s.tokens),
    "agreement": Measure(lambda s: s.agreed or 0, lambda s: 0 if s.agreed is None else s.tokens),
}
"""Exact match over questions; perplexity, KL and top-1 agreement with the reference over predicted tokens."""


@dataclass(frozen=True)
class Quality:
    scores: Sequence[SampleScore]
    """One of each sample, in the order of the samples' indices."""

    def summary(self) -> dict[str, Any]:
        """All measures over everything, by kind and by modality, each with its interval (None for too few samples);
        those that nothing is known about are left out."""
        kinds = sorted({score.kind for score in self.scores})
        seen = [name for name in MODALITIES if any(score.modality == name for score in self.scores)]
        return {
            **self._row(self.scores),
            "kinds": {kind: self._row([s for s in self.scores if s.kind == kind]) for kind in kinds},
            "modalities": {name: self._row([s for s in self.scores if s.modality == name]) for name in seen},
        }

    def _row(self, scores: Sequence[SampleScore]) -> dict[str, Any]:
        row: dict[str, Any] = {"samples": len(scores), "tokens": sum(score.tokens for score in scores)}
        intervals = {}
        for name, measure in MEASURES.items():
            if known := measure.known(scores):
                values, weights = measure.columns(known)
                row[name] = float(measure.of_ratio(values.sum() / weights.sum()))
                intervals[name] = interval(values, weights, measure=measure.of_ratio)
        return row | {"intervals": intervals}

    def columns(self) -> dict[str, list[Any]]:
        """Every sample's numbers, for a file; `from_columns` is the inverse."""
        rows = [asdict(score) for score in self.scores]
        return {field.name: [row[field.name] for row in rows] for field in fields(SampleScore)}

    @classmethod
    def from_columns(cls, columns: Mapping[str, Iterable[Any]]) -> "Quality":
        names = [field.name for field in fields(SampleScore)]
        return cls([SampleScore(*row) for row in zip(*(columns[name] for name in names), strict=True)])


def difference(name: str, one: Quality, other: Quality) -> tuple[float, Interval | None]:
    """How much larger a measure is for `one` than for `other` on the same samples, and its paired interval."""
    measure = MEASURES[name]
    mine, theirs = measure.known(one.scores), measure.known(other.scores)
    if [score.index for score in mine] != [score.index for score in theirs]:
        raise ValueError("two models are compared on the same samples")
    (a, weights), (b, _) = measure.columns(mine), measure.columns(theirs)
    ratio = [float(measure.of_ratio(x.sum() / weights.sum())) for x in (a, b)]
    return ratio[0] - ratio[1], interval(a, weights, b, measure.of_ratio)


def too_few(samples: int) -> str | None:
    """What is to be said where there are no intervals."""
    if samples >= FEWEST:
        return None
    return f"too few samples for an interval: {samples}, where {FEWEST} are needed; differences may be noise"
