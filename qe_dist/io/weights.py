"""Tensors of a model directory, by name, one at a time: no process ever holds the model."""

import contextlib
import json
import math
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.source import WeightSource
from qe_dist.io.shards import Span, Stored, header_end, parse_header, unreadable

INDEX = "model.safetensors.index.json"
HEADER_GUESS = 64 * 1024
"""Bytes that the header of a shard hardly ever exceeds: one read instead of two."""
ADVISED_BYTES = 128 * 1024
"""Linux cuts an advice down to the read-ahead window of the device, and this is its default."""

CHECKED_VALUES = 2**22
"""At a time: the check makes copies of what it looks at."""


class LocalFiles:
    """A model directory on disk. Tensors are maps of it: the kernel may drop their pages and read them again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def shown(self, name: str) -> str:
        """How a message names a file."""
        return str(self.folder / name)

    def size(self, name: str) -> int | None:
        """None where there is no such file."""
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        return [self._read(span) for span in spans]

    def _read(self, span: Span) -> bytes:
        try:
            with (self.folder / span.file).open("rb") as file:
                file.seek(span.begin)
                return file.read(span.size)
        except OSError as error:
            raise unreadable(self.shown(span.file), error) from None

    def get(self, name: str, stored: Stored) -> Tensor:
        try:
            with safe_open(self.folder / stored.span.file, framework="pt") as shard:
                return shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise unreadable(self.shown(stored.span.file), error) from None

    def prefetch(self, spans: Iterable[Span]) -> None:
        """Asks the kernel to read ahead into the page cache, which is memory that any process may take back."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        for span in spans:
            with contextlib.suppress(OSError), (self.folder / span.file).open("rb") as file:
                for begin in range(span.begin, span.end, ADVISED_BYTES):
                    length = min(ADVISED_BYTES, span.end - begin)
                    os.posix_fadvise(file.fileno(), begin, length, os.POSIX_FADV_WILLNEED)


class SafetensorsSource:
    """A Hugging Face model directory. Opening it reads headers only; `get` holds one tensor."""

    def __init__(self, model: Path) -> None:
        self._files = LocalFiles(Path(model))
        self.folder = self._files.folder
        self.config = self._read_json("config.json")
        weight_map: dict[str, str] = {}
        if self._files.size(INDEX) is not None:
            weight_map = self._read_json(INDEX).get("weight_map", {})
        shards = sorted(set(weight_map.values())) or ["model.safetensors"]
        self._stored: dict[str, Stored] = {}
        for shard, header in self._headers(shards).items():
            self._stored |= parse_header(self._files.shown(shard), shard, header, self._size(shard))
        missing = sorted(set(weight_map) - set(self._stored))
        if missing:
            raise CheckpointError(
                f"{self._files.shown(INDEX)} places {missing[0]} (and {len(missing) - 1} more) in "
                f"{weight_map[missing[0]]}, which does not hold it; copy the shard again"
            )

    def _read_json(self, name: str) -> dict[str, Any]:
        path, shown = self.folder / name, self._files.shown(name)
        if not path.exists():
            raise ConfigError(f"{shown} does not exist; expected a Hugging Face model directory")
        try:
            return json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{shown} is not JSON: {error}") from None

    def _headers(self, shards: Sequence[str]) -> dict[str, bytes]:
        """The JSON at the beginning of each shard."""
        starts = [Span(shard, 0, min(self._size(shard), HEADER_GUESS)) for shard in shards]
        found = dict(zip(shards, self._files.read(starts), strict=True))
        longer = [
            Span(shard, 0, header_end(start))
            for shard, start in found.items()
            if len(start) < header_end(start) <= self._size(shard)
        ]
        found |= zip((span.file for span in longer), self._files.read(longer), strict=True)
        return {shard: start[8 : header_end(start)] for shard, start in found.items()}

    def _size(self, shard: str) -> int:
        size = self._files.size(shard)
        if size is None:
            raise CheckpointError(
                f"{self._files.shown(shard)} is missing; a model directory needs every safetensors shard "
                "that its index names"
            )
        return size

    def names(self) -> Collection[str]:
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def get(self, name: str) -> Tensor:
        stored = self._find(name)
        tensor = self._files.get(name, stored)
        if not all(part.isfinite().all() for part in tensor.flatten().split(CHECKED_VALUES)):
            raise CheckpointError(f"{self._files.shown(stored.span.file)}: {name} contains NaN or Inf")
        return tensor

    def prefetch(self, names: Iterable[str]) -> None:
        """Begins to read these tensors ahead and returns at once."""
        self._files.prefetch([self._find(name).span for name in names])

    def _find(self, name: str) -> Stored:
        if name not in self._stored:
            raise CheckpointError(f"{self._files.shown('')} has no tensor {name}, which the architecture needs")
        return self._stored[name]


def upper_bytes(source: WeightSource, names: Collection[str]) -> int:
    """Upper bound of what these tensors take, without reading them."""
    return sum(4 * math.prod(source.shape(name)) for name in names)
