"""The tensors of a model directory, by name and one at a time, so that no process holds the model."""

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.source import WeightSource
from qe_dist.io.bucket import is_url
from qe_dist.io.files import open_files
from qe_dist.io.folder import named_by_file, no_config
from qe_dist.io.index import merge, read_index, same_bytes
from qe_dist.io.shards import Span, Stored, check_start, header_end, parse_header

JSON_FILES = frozenset({
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json",
})  # fmt: skip
"""Files beside the weights that loaders read."""
HEADER_GUESS = 64 * 1024
"""Bytes that the header of a shard hardly ever exceeds: one read instead of two."""
CHECKED_VALUES = 2**22
"""Values that are checked for NaN at a time; the check copies them."""
SAMPLED_BYTES = 1024
"""Bytes of every tensor that are part of the fingerprint."""


class SafetensorsSource:
    """A Hugging Face model directory, on disk or behind a URL, with every tensor that its shards hold. Opening it reads
    headers only; `get` holds one tensor.

    Raises ConfigError when there is no model, saying what is there instead, and CheckpointError for files that are
    missing, damaged or contradict each other.
    """

    def __init__(self, model: Path | str) -> None:
        if not is_url(model) and Path(model).is_file():
            raise ConfigError(named_by_file(Path(model)))
        self._files = open_files(model)
        self.folder = self._files.folder
        self.config = self._read_config()
        self._check_small_files()
        index = read_index(self._files)
        self.notes = index.notes
        """What of the folder is left out, and why."""
        self._headers = self._read_headers(index.shards)
        held = {
            shard: parse_header(self.shown(shard), shard, header, self._size(shard))
            for shard, header in self._headers.items()
        }
        self._stored = merge(self._files, index, held)

    def shown(self, name: str = "") -> str:
        """How a message names a file of the model, or its folder."""
        return self._files.shown(name)

    def _read_config(self) -> dict[str, Any]:
        path, shown = self.folder / "config.json", self.shown("config.json")
        if "config.json" not in self._files.names():
            raise ConfigError(no_config(self._files))
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{shown} is not JSON: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{shown} cannot be read: {error.strerror}") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{shown} is not the config of a model: expected an object, found {str(config)[:40]}")
        return config

    def _check_small_files(self) -> None:
        """What is copied into the checkpoint must be JSON, or loaders would end on it there. An adapter beside a whole
        model is refused: transformers would load both where peft is installed, and we and vLLM would not."""
        names = self._files.names()
        if "adapter_config.json" in names:
            raise ConfigError(
                f"{self.shown()} holds a model and, in adapter_config.json, an adapter: some loaders would apply it, "
                "others not. Merge it into the model, or move its files elsewhere"
            )
        for name in sorted(JSON_FILES.intersection(names)):
            try:
                json.loads((self.folder / name).read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{self.shown(name)} is not JSON: {error}; copy it again") from None
            except OSError as error:
                raise CheckpointError(f"{self.shown(name)} cannot be read: {error.strerror}") from None

    def _read_headers(self, shards: Sequence[str]) -> dict[str, bytes]:
        """The JSON at the beginning of each shard."""
        starts = [Span(shard, 0, min(self._size(shard), HEADER_GUESS)) for shard in shards]
        found = dict(zip(shards, self._files.read(starts), strict=True))
        for shard, start in found.items():
            check_start(self.shown(shard), start, self._size(shard))
        longer = [
            Span(shard, 0, header_end(start))
            for shard, start in found.items()
            if len(start) < header_end(start) <= self._size(shard)
        ]
        found |= zip((span.file for span in longer), self._files.read(longer), strict=True)
        return {shard: start[8 : header_end(start)] for shard, start in found.items()}

    def _size(self, shard: str) -> int:
        size = self._files.size(shard)
        if size is None and (self.folder / shard).is_symlink():
            raise CheckpointError(
                f"{self.shown(shard)} is a link to {(self.folder / shard).readlink()}, which does not exist; fetch the "
                "model again, or give a folder that holds the file itself"
            )
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

    def dtype(self, name: str) -> torch.dtype:
        """The type of the tensor as it is stored."""
        return self._find(name).dtype

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are equal to the bit. Reads a few MiB of them at a time."""
        return same_bytes(self._files, self._find(one), self._find(other))

    def get(self, name: str) -> Tensor:
        stored = self._find(name)
        tensor = self._files.get(name, stored)
        whole = tensor.to(torch.float32) if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor
        if not all(part.isfinite().all() for part in whole.flatten().split(CHECKED_VALUES)):
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
