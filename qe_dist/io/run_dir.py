"""The run directory: what is finished stays finished.

OUTPUT/.run/ holds run.json (identity), activations/ (the input of each wave) and blocks/ (finished blocks with
their reports). Every publish is a write to a temporary name, fsync of file and directory, rename. `assemble`
moves the blocks up to OUTPUT itself and writes config.json last, so a directory with a config is whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qe_dist.core.batch import Batch
from qe_dist.core.errors import CheckpointError, ConfigError


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path and makes its result appear under `path` all at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error.strerror or error}; free some space (or mend the "
            "permissions) and type the same command again, nothing finished is lost"
        ) from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def publish_json(path: Path, content: Any) -> None:
    publish(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))


def publish_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    metadata = {"format": "pt"}
    ready = {k: v.detach().cpu().contiguous() for k, v in sorted(tensors.items())}
    publish(path, lambda p: save_file(ready, p, metadata=metadata))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunDir:
    """Paths and state of one run."""

    def __init__(self, output: Path) -> None:
        self.output = Path(output)
        self.root = self.output / ".run"

    def open(self, identity: Mapping[str, Any], resume: str) -> bool:
        """Claims the directory for this run; True where an earlier run of the same identity is continued."""
        marker = self.root / "run.json"
        if not marker.exists():
            if resume == "required":
                raise ConfigError(f"{self.output} holds no run to continue (resume=required)")
            self._refuse_foreign()
            publish_json(marker, identity)
            return False
        if resume == "never":
            raise ConfigError(f"{self.output} holds a run already (resume=never)")
        before = json.loads(marker.read_text())
        different = _differences(before, json.loads(json.dumps(identity)))
        if different:
            raise ConfigError(
                f"{self.output} belongs to another run, which differs in {'; '.join(different)}. "
                "Choose another output directory, or the same settings to continue it"
            )
        return True

    def _refuse_foreign(self) -> None:
        """A directory in which an earlier call could not even write its marker counts as empty."""
        if self.output.exists() and not self.output.is_dir():
            raise ConfigError(f"{self.output} is a file; choose an empty output directory")
        inside = self.output.rglob("*") if self.output.exists() else ()
        if any(p != self.root and not p.name.endswith(".tmp") for p in inside):
            raise ConfigError(f"{self.output} exists and is not a run of ours; choose an empty output directory")

    @property
    def is_complete(self) -> bool:
        return (self.output / "config.json").exists()

    # -- activations

    def _batch_path(self, block: int, index: int) -> Path:
        return self.root / "activations" / f"block-{block:05d}" / f"batch-{index:05d}.safetensors"

    def has_batch(self, block: int, index: int) -> bool:
        """Whether the input of a block is there (it is spooled where a wave begins)."""
        return self._batch_path(block, index).exists()

    def put_batch(self, block: int, batch: Batch) -> None:
        publish_tensors(self._batch_path(block, batch.index), batch.tensors())

    def get_batch(self, block: int, index: int) -> Batch:
        path = self._batch_path(block, index)
        try:
            return Batch.from_tensors(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it and continue") from None

    def drop_batches_before(self, block: int) -> None:
        """Forgets the inputs of waves that are over. The last one's is kept, should the next one's be damaged."""
        for folder in (self.root / "activations").glob("block-*"):
            if folder.name < f"block-{block:05d}":
                shutil.rmtree(folder)

    # -- blocks

    def block_name(self, index: int) -> str:
        return f"block-{index:05d}.safetensors"

    def _report_path(self, index: int) -> Path:
        return self.root / "blocks" / f"block-{index:05d}.json"

    def has_block(self, index: int) -> bool:
        """The report is published after the tensors, so it vouches for them."""
        return self._report_path(index).exists()

    def put_block(self, index: int, tensors: Mapping[str, Tensor], report: dict[str, Any]) -> None:
        path = self.root / "blocks" / self.block_name(index)
        publish_tensors(path, tensors)
        names = {k: list(v.shape) for k, v in sorted(tensors.items())}
        publish_json(self._report_path(index), {**report, "sha256": sha256(path), "tensors": names})

    def block_report(self, index: int) -> dict[str, Any]:
        return json.loads(self._report_path(index).read_text())

    def last_spooled(self, block: int, num_batches: int) -> int:
        """The last block up to `block` whose input is spooled completely, else 0."""
        return next((b for b in range(block, 0, -1) if all(self.has_batch(b, i) for i in range(num_batches))), 0)

    def clean(self) -> None:
        """Drops what only a continuation would need, and what killed writers left."""
        shutil.rmtree(self.root / "activations", ignore_errors=True)
        for left in self.output.rglob(".*.tmp"):
            left.unlink(missing_ok=True)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({a!r} then, {b!r} now)")
    return found
