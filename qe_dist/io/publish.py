"""All of a file or nothing: write to a temporary name, fsync file and directory, rename.

Nothing here needs more of a file system than NFS gives: no flock, no process ids in names that other hosts see.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qe_dist.core.errors import CheckpointError


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path and makes its result appear under `path` all at once.

    CheckpointError where the disk is full or the place cannot be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        make_folder(path.parent)
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path} could not be written: {said}; free some space (or mend the permissions) and type the same "
            "command again, nothing finished is lost"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def publish_json(path: Path, content: Any) -> None:
    publish(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def publish_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of a checkpoint. The same tensors give the same bytes."""
    ready = _ready(tensors)
    publish(path, lambda p: save_file(ready, p, metadata={"format": "pt"}))


def publish_sealed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that holds the SHA-256 of its own tensors, for `read_sealed`."""
    ready = _ready(tensors)
    # One key only: safetensors writes several in an order that changes from run to run.
    publish(path, lambda p: save_file(ready, p, metadata={"sha256": digest(ready)}))


def read_sealed(path: Path) -> dict[str, Tensor]:
    """The tensors of a sealed file. CheckpointError where they are not those that were written."""
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
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path) -> None:
    """With its parents, each synced, so that a file in it survives a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def refresh(folder: Path) -> None:
    """Makes this host see what others did in a folder: an NFS client believes what it saw there (and, worse, what it
    did not see) for up to a minute, until it changes the folder itself."""
    with contextlib.suppress(OSError):
        probe = folder / f".refresh.{uuid.uuid4().hex}.tmp"
        probe.touch()
        probe.unlink()


def _ready(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in sorted(tensors.items())}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
