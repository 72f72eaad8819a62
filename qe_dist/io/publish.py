"""Files that appear whole or not at all: written under a temporary name, fsynced with their directory, renamed.

NFS is enough for this: no flock is used, and no process ids in names that other hosts see. Safetensors files are
written here and not by the library, whose writer leaves a temporary file of another name when it is killed, makes files
that only their owner can read, and writes metadata in an order that changes from run to run. The hash is computed while
writing, so that the file is not read again.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qe_dist.core.errors import NO_ROOM, CheckpointError, TemporaryFileError

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
"""Types by their names in safetensors."""


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path, and renames the result to `path`.

    Raises `cannot_write` when it cannot be written; a file that was at `path` before stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        make_folder(path.parent)
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> CheckpointError:
    """The error to raise for a path that cannot be written: TemporaryFileError where there is no room."""
    full = error.errno in NO_ROOM
    return (TemporaryFileError if full else CheckpointError)(
        f"{path} could not be written: {error.strerror or error}; free some space (or mend the permissions) and "
        "type the same command again, nothing finished is lost"
    )


def publish_json(path: Path, content: Any) -> None:
    """Publishes a JSON file. Raises as `publish` does."""
    publish(path, lambda p: p.write_bytes(json_bytes(content)))


def json_bytes(content: Any) -> bytes:
    """The bytes that `publish_json` writes."""
    return (json.dumps(content, indent=1) + "\n").encode()


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises CheckpointError when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def publish_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Publishes a safetensors file and returns its SHA-256. The same tensors give the same bytes."""
    return publish_one_by_one(path, tensors, tensors.__getitem__, metadata)


def publish_one_by_one(
    path: Path,
    described: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Like `publish_tensors`, but `make` is called for each tensor when it is written, so that one is held at a time.

    described: a tensor of the same type and shape by each name, for example on the meta device.
    """
    total = hashlib.sha256()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for part in _serialized(described, make, metadata or {"format": "pt"}):
                total.update(part)
                file.write(part)

    publish(path, write)
    return total.hexdigest()


def publish_sealed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Publishes a safetensors file that holds the SHA-256 of its own tensors, for `read_sealed`."""
    publish_tensors(path, tensors, {"sha256": digest(tensors)})


def read_sealed(path: Path) -> dict[str, Tensor]:
    """The tensors of a sealed file. Raises CheckpointError when they are not those that were written."""
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    found = digest(tensors)
    if found != expected:
        raise CheckpointError(f"{path} is damaged: SHA-256 of its tensors expected {expected}, found {found}")
    return tensors


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(_raw(tensor))
    return total.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, and syncs each, so that a file in it survives a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def refresh(folder: Path) -> None:
    """Makes this host see what other hosts changed in a folder. An NFS client caches what is there (and what is not)
    for up to a minute, unless it changes the folder itself."""
    with contextlib.suppress(OSError):
        probe = folder / f".refresh.{uuid.uuid4().hex}.tmp"
        probe.touch()
        probe.unlink()


def _serialized(
    tensors: Mapping[str, Tensor], make: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file: length of the header, header, tensors. Wide types come first, so that every
    tensor is aligned to its element size."""
    types = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": types[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name, _ in ordered:
        yield _raw(make(name))


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
