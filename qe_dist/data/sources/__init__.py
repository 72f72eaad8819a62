"""Where samples come from: each file beside this one is a source, and is asked in turn whether a name is one of its."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qe_dist.core.errors import ConfigError
from qe_dist.data.options import ReadOptions

GUIDE = "docs/guides/data.md"


@dataclass(frozen=True)
class Record:
    """A sample as its source has it."""

    origin: str
    """`file:line`, or the like."""
    content: Any
    folder: Path
    """Where the relative paths of its images begin."""


@dataclass(frozen=True)
class Fault:
    """A sample that the source cannot read."""

    message: str
    """Begins with the origin."""


Note = Callable[[str, str], None]
"""Takes what is to be said, and of which image or sample."""


class CalibrationSource(Protocol):
    """Samples of one kind of place. What they say is read in one place for all of them (`data/shapes.py`), and so are
    their fingerprint and their number of tokens, which are exact (`data/samples.py`)."""

    def records(self, note: Note) -> Iterator[Record | Fault]:
        """In their order. note: is told of all that is left out.

        Raises ConfigError where the place as a whole cannot be read.
        """
        ...


def open_source(name: str, options: ReadOptions) -> CalibrationSource:
    """The source of a name, as options of commands have it. ConfigError where there is none of this name."""
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        found: CalibrationSource | None = importlib.import_module(f"{__name__}.{module}").find(name, options)
        if found is not None:
            return found
    what = "is no file of samples that is known here" if Path(name).exists() else "does not exist"
    raise ConfigError(f"{name} {what}; expected JSON lines, a folder of images, parquet, hf:NAME#SPLIT, ...: {GUIDE}")
