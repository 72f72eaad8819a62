"""The tensors of a model directory, by name and one at a time, so that no process holds the model."""

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.source import WeightSource
from qe_dist.io.files import open_files
from qe_dist.io.shards import DTYPES, PACKED_DTYPES, Span, Stored, header_end, parse_header

INDEX = "model.safetensors.index.json"
HEADER_GUESS = 64 * 1024
"""Bytes that the header of a shard hardly ever exceeds: one read instead of two."""
CHECKED_VALUES = 2**22
"""Values that are checked for NaN at a time; the check copies them."""
SAMPLED_BYTES = 1024
"""Bytes of every tensor that are part of the fingerprint."""


class SafetensorsSource:
    """A Hugging Face model directory, on disk or behind a URL. Opening it reads headers only; `get` holds one tensor.

    packed: whether the model may be quantized. Raises ConfigError when there is no model, and CheckpointError for files
    that are missing or damaged.
    """

    def __init__(self, model: Path | str, packed: bool = False) -> None:
        self._files = open_files(model)
        self.folder = self._files.folder
        self.config = self._read_json("config.json")
        weight_map: dict[str, str] = {}
        if self._files.size(INDEX) is not None:
            weight_map = self._read_json(INDEX).get("weight_map", {})
        shards = sorted(set(weight_map.values())) or ["model.safetensors"]
        self._headers = self._read_headers(shards)
        self._stored: dict[str, Stored] = {}
        for shard, header in self._headers.items():
            self._stored |= parse_header(
                self._files.shown(shard), shard, header, self._size(shard), PACKED_DTYPES if packed else DTYPES
            )
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

    def _read_headers(self, shards: Sequence[str]) -> dict[str, bytes]:
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
        """Begins to read these tensors and returns at once."""
        self._files.prefetch([self._find(name).span for name in names])

    def fingerprint(self) -> str:
        """Hash of config, tokenizer and processor files, every shard's header, and some bytes of each tensor. It is
        cheap for any size, does not depend on where the model lies, and changes when the model is retrained."""
        texts = [f for f in sorted(self.folder.iterdir()) if f.suffix in (".json", ".jinja", ".txt")]
        parts = [f.name.encode() + f.read_bytes() for f in texts]
        names = sorted(self._stored)
        samples = dict(zip(names, self._files.read([_sample(self._stored[n].span) for n in names]), strict=True))
        for shard in sorted(self._headers):
            parts.append(f"{shard} {self._size(shard)}".encode() + self._headers[shard])
            parts += [samples[name] for name in names if self._stored[name].span.file == shard]
        return hashlib.sha256(b"\n".join(parts)).hexdigest()[:16]

    def _find(self, name: str) -> Stored:
        if name not in self._stored:
            raise CheckpointError(f"{self._files.shown('')} has no tensor {name}, which the architecture needs")
        return self._stored[name]


def upper_bytes(source: WeightSource, names: Collection[str]) -> int:
    """Upper bound of the bytes of these tensors, without reading them."""
    return sum(4 * math.prod(source.shape(name)) for name in names)


def _sample(span: Span) -> Span:
    middle = (span.begin + span.end) // 2
    return Span(span.file, middle, min(middle + SAMPLED_BYTES, span.end))
