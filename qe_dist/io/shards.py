"""The header of a safetensors file: type, shape and place of each tensor."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qe_dist.core.errors import CheckpointError

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Types of a model in full precision."""
DTYPES = FLOATS | {
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool, "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
"""Types of any model: quantized ones, and what older ones keep beside their weights, such as positions."""
MAX_HEADER = 100_000_000
"""Bytes of a header; the safetensors library reads no longer one."""
NOT_TENSORS = {
    b"version https://git-lfs": "it is a pointer of git-lfs, not the file; run `git lfs pull` in its folder",
    b"<!DOCTYPE": "it is a web page, not the file; download it again",
    b"<html": "it is a web page, not the file; download it again",
    b"PK\x03\x04": "it is a pickle of PyTorch; save the model again with transformers, which writes safetensors",
    b"GGUF": "it is a GGUF file; give the model that it was made of, as safetensors",
}
"""Beginnings of files that are called .safetensors and are none, and what to do about each."""


@dataclass(frozen=True)
class Span:
    """A range of bytes of a file."""

    file: str
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Stored:
    """Type, shape and place of a tensor in its shard."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    span: Span


def header_end(start: bytes) -> int:
    """The byte at which the tensors of a safetensors file begin.

    start: the first bytes of the file, at least 8.
    """
    return 8 + int.from_bytes(start[:8], "little")


def check_start(shown: str, start: bytes, size: int) -> None:
    """CheckpointError for a file that is no safetensors file at all, or whose header cannot be as long as it says.

    start: its first bytes. size: of the whole file.
    """
    for beginning, reason in NOT_TENSORS.items():
        if start.startswith(beginning):
            raise CheckpointError(f"{shown} holds no tensors: {reason}")
    if size < 8:
        raise unreadable(shown, f"it has {size} bytes")
    if header_end(start) > min(size, MAX_HEADER):
        raise unreadable(shown, f"it has {size} bytes, and a header of {header_end(start) - 8}")


def parse_header(shown: str, shard: str, header: bytes, size: int) -> dict[str, Stored]:
    """All tensors of a shard by name.

    shown: how messages name the shard. header: its JSON. size: bytes of the whole file. Raises CheckpointError when the
    header is damaged, does not fit the file, or has a type that torch does not know. What is accepted here, the
    safetensors library opens, too.
    """
    start = 8 + len(header)
    try:
        entries = dict(json.loads(header, object_pairs_hook=_unique))
        metadata = entries.pop("__metadata__", None) or {}
        stored = {name: _stored(shown, shard, start, name, entry) for name, entry in entries.items()}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("metadata")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise unreadable(shown, "its header is damaged") from None
    end = start
    for name, one in sorted(stored.items(), key=lambda item: (item[1].span.begin, item[1].span.end)):
        if one.span.size != math.prod(one.shape) * one.dtype.itemsize:
            raise unreadable(shown, f"{name} has {one.span.size} bytes, which is not its shape {list(one.shape)}")
        if one.span.begin != end:
            raise unreadable(shown, f"{name} begins at byte {one.span.begin}, expected {end}")
        end = one.span.end
    if end != size:
        raise unreadable(shown, f"it has {size} bytes, its header speaks of {end}")
    return stored


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError for a name that comes twice, of which `json` would keep the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def unreadable(shown: str, reason: object) -> CheckpointError:
    """The error for a file that is not a whole safetensors file, or that the system does not give."""
    if isinstance(reason, OSError) and reason.strerror:
        return CheckpointError(
            f"{shown} cannot be read: {reason.strerror}; safetensors files are often saved for their owner alone: "
            "mend the permissions (chmod a+r), or copy it"
        )
    return CheckpointError(f"{shown} cannot be read as safetensors ({reason}); it may be truncated, copy it again")


def _stored(shown: str, shard: str, start: int, name: str, entry: Mapping[str, Any]) -> Stored:
    begin, end = entry["data_offsets"]
    numbers = (begin, end, *entry["shape"])
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or begin > end:
        raise ValueError("offsets and shape")
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{shown}: {name} has dtype {entry['dtype']}, which torch cannot hold; expected one of {', '.join(DTYPES)}"
        )
    return Stored(DTYPES[entry["dtype"]], tuple(entry["shape"]), Span(shard, start + begin, start + end))
