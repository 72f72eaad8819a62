"""Several sources that take turns by chance: `a.jsonl=0.6,b.parquet=0.4`."""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qe_dist.core.errors import ConfigError
from qe_dist.data.options import ReadOptions
from qe_dist.data.sources import CalibrationSource, Fault, Note, Record, open_source

PART = re.compile(r"(.+)=(\d+(?:\.\d*)?|\.\d+)", re.DOTALL)


@dataclass(frozen=True)
class Mixture:
    """The next sample is of a source that is drawn by its weight; where that one has no more, the mixture ends."""

    parts: tuple[tuple[CalibrationSource, float], ...]
    seed: int

    def records(self, note: Note) -> Iterator[Record | Fault]:
        streams = [source.records(note) for source, _ in self.parts]
        ends = list(itertools.accumulate(weight for _, weight in self.parts))
        drawn = random.Random(self.seed)
        while True:
            at = drawn.random() * ends[-1]
            record = next(streams[next(i for i, end in enumerate(ends) if at < end)], None)
            if record is None:
                return
            yield record


def find(name: str, options: ReadOptions) -> Mixture | None:
    """Names with weights, unless there is a file of this name."""
    pieces = [PART.fullmatch(piece.strip()) for piece in name.split(",")]
    if not all(pieces) or Path(name).exists():
        return None
    parts = [(piece[1], float(piece[2])) for piece in pieces if piece is not None]
    if any(weight == 0 for _, weight in parts):
        raise ConfigError(f"{name}: every weight must be above 0")
    return Mixture(tuple((open_source(part, options), weight) for part, weight in parts), options.seed)
