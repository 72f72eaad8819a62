"""Which shard has which tensor: read as transformers and vLLM read it, and refused where the two would differ."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from qe_dist.core.errors import CheckpointError
from qe_dist.io.files import Files
from qe_dist.io.folder import INDEX, SINGLE, no_weights
from qe_dist.io.shards import Span, Stored

READ_AT_A_TIME = 2**24


@dataclass(frozen=True)
class Index:
    """The shards of a model, before any of them is opened."""

    shards: tuple[str, ...]
    placed: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> shard, as the index file says; empty where there is one file alone."""
    notes: tuple[str, ...] = ()
    """What is left out, and why."""


def read_index(files: Files) -> Index:
    """CheckpointError where no weights are there, the index is damaged, or loaders would read different files."""
    names = files.names()
    if INDEX not in names:
        if SINGLE not in names:
            raise CheckpointError(no_weights(files))
        return Index((SINGLE,), notes=tuple(_strays(files, {SINGLE})))
    placed = _weight_map(files)
    shards = tuple(sorted(set(placed.values())))
    if SINGLE in names and SINGLE not in shards:
        raise CheckpointError(
            f"{files.shown('')} has both {SINGLE} and {INDEX}, which does not name it: transformers would read the one "
            "and vLLM the other. Remove the one that is not of this model"
        )
    return Index(shards, placed, tuple(_strays(files, shards)))


def _weight_map(files: Files) -> dict[str, str]:
    shown = files.shown(INDEX)
    try:
        placed: Any = json.loads((files.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        whole = bool(placed) and all(isinstance(x, str) for pair in placed.items() for x in pair)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{shown} is damaged: expected a weight_map of tensors and their files; copy it again")
    for name, shard in placed.items():
        if not _is_file_name(shard):
            raise CheckpointError(
                f"{shown} places {name[:200]} in {shard[:80]!r}; expected a file in the same folder; copy it again"
            )
    return placed


def _is_file_name(name: str) -> bool:
    """Whether a name is one of a file in the same folder, on every system."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < length < 256 and PurePosixPath(name).name == name and "\\" not in name and "\0" not in name


def _strays(files: Files, shards: Collection[str]) -> Iterator[str]:
    others = sorted(name for name in files.names() if name.endswith(".safetensors") and name not in shards)
    if others:
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        yield f"{files.shown(others[0])}{more} is not a part of this model and is left out"


def merge(files: Files, index: Index, held: Mapping[str, Mapping[str, Stored]]) -> dict[str, Stored]:
    """All tensors of a model, by name.

    held: shard -> its tensors. Raises CheckpointError for a tensor that is not where the index places it, and for one
    that two shards hold with different values, of which each loader would take another.
    """
    places: dict[str, list[str]] = {}
    for shard, tensors in held.items():
        for name in tensors:
            places.setdefault(name, []).append(shard)
    absent = [name for name, shard in index.placed.items() if shard not in places.get(name, ())]
    if absent:
        elsewhere = places.get(absent[0])
        remedy = f"{elsewhere[0]} does: copy the index again" if elsewhere else "copy the shard again"
        raise CheckpointError(
            f"{files.shown(INDEX)} places {absent[0]} (and {len(absent) - 1} more) in {index.placed[absent[0]]}, which "
            f"does not hold it; {remedy}"
        )
    for name, shards in places.items():
        first, *others = (held[shard][name] for shard in shards)
        if not all(same_bytes(files, first, other) for other in others):
            raise CheckpointError(
                f"{files.shown('')} has {name} twice, with different values, in {shards[0]} and {shards[1]}: loaders "
                "would take one or the other. Remove what is not of this model"
            )
    return {name: held[index.placed.get(name, shards[0])][name] for name, shards in places.items()}


def same_bytes(files: Files, one: Stored, other: Stored) -> bool:
    """Whether two tensors are equal to the bit. Reads a few MiB at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for at in range(0, one.span.size, READ_AT_A_TIME):
        parts = [
            Span(s.span.file, s.span.begin + at, min(s.span.begin + at + READ_AT_A_TIME, s.span.end))
            for s in (one, other)
        ]
        if len(set(files.read(parts))) > 1:
            return False
    return True
