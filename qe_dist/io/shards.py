"""The header of a safetensors file: type, shape and place of each tensor."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qe_dist.core.errors import CheckpointError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
PACKED_DTYPES = DTYPES | {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}
"""Types in a quantized checkpoint."""


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


def parse_header(
    shown: str, shard: str, header: bytes, size: int, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> dict[str, Stored]:
    """All tensors of a shard by name.

    shown: how messages name the shard. header: its JSON. size: bytes of the whole file. dtypes: the allowed ones.
    Raises CheckpointError when the header is damaged, does not fit the file, or names a tensor of another dtype.
    """
    start = 8 + len(header)
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for name, entry in entries.items():
            if entry["dtype"] not in dtypes:
                raise CheckpointError(
                    f"{shown}: {name} has dtype {entry['dtype']}, expected one of {tuple(dtypes)}; "
                    "only full-precision models can be quantized"
                )
        stored = {name: _stored(shard, start, entry, dtypes) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise unreadable(shown, "its header is damaged") from None
    for name, one in stored.items():
        if one.span.size != math.prod(one.shape) * one.dtype.itemsize:
            raise unreadable(shown, f"{name} has {one.span.size} bytes, which is not its shape {list(one.shape)}")
    end = max((one.span.end for one in stored.values()), default=start)
    if end != size:
        raise unreadable(shown, f"it has {size} bytes, its header speaks of {end}")
    return stored


def unreadable(shown: str, reason: object) -> CheckpointError:
    """The error for a file that is not a whole safetensors file."""
    return CheckpointError(f"{shown} cannot be read as safetensors ({reason}); it may be truncated, copy it again")


def _stored(shard: str, start: int, entry: dict, dtypes: Mapping[str, torch.dtype]) -> Stored:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end:
        raise ValueError("offsets")
    return Stored(dtypes[entry["dtype"]], tuple(entry["shape"]), Span(shard, start + begin, start + end))
