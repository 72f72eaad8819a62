"""Tables that the library `datasets` reads row by row: parquet, data sets saved on disk, and those of the hub.

    FILE.parquet, DIR with *.parquet in it, DIR of save_to_disk[#SPLIT], hf:NAME[@REVISION][:CONFIG][#SPLIT]

Rows come as they are asked for, with images undecoded: of a data set of the hub no more is loaded than is read. Offline
(HF_HUB_OFFLINE=1), it is the one that `datasets` has in its cache.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qe_dist.core.errors import ConfigError
from qe_dist.data.options import ReadOptions
from qe_dist.data.sources import Fault, Note, Record

HUB = re.compile(r"hf:([^@:#]+)(?:@([^:#]+))?(?::([^#]+))?(?:#(.+))?")
SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Table:
    name: str
    folder: Path
    """Where relative paths of images begin."""
    load: Callable[[], Any]
    """Opens it by `datasets`: something with splits, or without."""
    split: str | None = None

    def records(self, note: Note) -> Iterator[Record | Fault]:
        rows = enumerate(self._rows(), start=1)
        while (found := self._next(rows)) is not None:
            number, row = found
            yield Record(f"{self.name}: row {number}", row, self.folder)

    def _next(self, rows: Iterator[tuple[int, Any]]) -> tuple[int, Any] | None:
        try:
            return next(rows, None)
        except (ConfigError, ImportError):
            raise
        except Exception as error:  # of readers, file systems and networks below `datasets`
            raise ConfigError(f"{self.name} cannot be read: {_first_line(error)}") from None

    def _rows(self) -> Iterator[Any]:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        found = self.load()
        if isinstance(found, dict):
            found = found[self._chosen(sorted(found))]
        elif self.split is not None and found.split is not None and str(found.split) != self.split:
            raise ConfigError(f"{self.name} has the split {found.split} alone")
        rows = found if isinstance(found, datasets.IterableDataset) else found.to_iterable_dataset()
        yield from rows.decode(False)

    def _chosen(self, splits: list[str]) -> str:
        if self.split is None and len(splits) == 1:
            return splits[0]
        if self.split not in splits:
            raise ConfigError(f"{self.name}: the splits are {', '.join(splits)}; say which: NAME#{splits[0]}")
        return str(self.split)


def find(name: str, options: ReadOptions) -> Table | None:
    """Names that begin with `hf:`, parquet files and folders of them, and folders that `datasets` saved."""
    if name.startswith("hf:"):
        return _of_hub(name)
    whole, _, split = name.rpartition("#") if "#" in name and not Path(name).exists() else (name, "", None)
    path = Path(whole)
    if path.is_dir() and any((path / marker).is_file() for marker in SAVED):
        return Table(name, path, lambda: _saved(path), split)
    if path.suffix.lower() == ".parquet" and path.is_file():
        return Table(name, path.parent, lambda: _parquet([path]), split)
    if path.is_dir() and (files := sorted(path.glob("*.parquet"))):
        return Table(name, path, lambda: _parquet(files), split)
    return None


def _saved(path: Path) -> Any:
    import datasets

    return datasets.load_from_disk(str(path))


def _parquet(files: list[Path]) -> Any:
    import datasets

    names = [str(path.resolve()) for path in files]
    return datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)


def _of_hub(name: str) -> Table:
    parts = HUB.fullmatch(name)
    if parts is None:
        raise ConfigError(f"{name} must be hf:NAME[@REVISION][:CONFIG][#SPLIT], such as hf:org/data#train")
    data, revision, config, split = parts.groups()

    def load() -> Any:
        import datasets
        from datasets.exceptions import DatasetNotFoundError

        offline = datasets.config.HF_HUB_OFFLINE
        try:
            return datasets.load_dataset(data, config, revision=revision, streaming=not offline)
        except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
            hint = "" if offline else "; HF_HUB_OFFLINE=1 takes one that is in the cache"
            raise ConfigError(f"{name} is not found: {_first_line(error)}{hint}") from None

    return Table(name, Path(), load, split)


def _first_line(error: Exception) -> str:
    """The message of what went wrong at first, shortened."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"[
        :300
    ]
