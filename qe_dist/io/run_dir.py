"""The run directory, in which finished work is kept.

OUTPUT/.run/ holds run.json (identity), lock/ (the process that works here), activations/ (the input of each wave),
quantized/ (that of the block that is tuned), tuning/ (its training, saved now and then) and blocks/ (finished files:
blocks, and parts of the passthrough). A report with its SHA-256 is published after each finished file. `assemble` moves
the files up to OUTPUT itself and writes config.json last, so a directory with a config is complete.
"""

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from qe_dist.core.batch import Batch
from qe_dist.core.errors import CheckpointError, ConfigError, TemporaryFileError
from qe_dist.core.version import FIRST, VERSION
from qe_dist.io.lock import RunLock
from qe_dist.io.publish import (
    digest,
    publish_json,
    publish_sealed,
    publish_tensors,
    read_json,
    read_sealed,
    refresh,
    sha256,
)

SpoolKind = Literal["activations", "quantized"]
"""Hidden states as the full-precision blocks made them, or as the quantized ones of a run that tunes did."""
log = logging.getLogger("qe_dist")
KINDS: tuple[SpoolKind, ...] = get_args(SpoolKind)
WRITER = "written_by"
"""Entry of run.json beside the identity: the version of qe_dist that began the run, or changed its recipe."""


class RunDir:
    """Paths and state of one run."""

    def __init__(self, output: Path) -> None:
        self.output = Path(output)
        self.root = self.output / ".run"
        self.locks = self.root / "lock"
        self.finished = self.root / "blocks"
        self.trainings = self.root / "tuning"

    def lock(self) -> RunLock:
        """The lock that a process must hold to change anything here. Raises ConfigError, before anything is written,
        for a directory that holds other files."""
        if not self._marker.exists():
            self._refuse_foreign()
        return RunLock(self.locks)

    @property
    def _marker(self) -> Path:
        return self.root / "run.json"

    def open(self, identity: Mapping[str, Any], resume: str) -> bool:
        """Writes the identity of a new run, or checks that of the run to continue. Returns whether one is continued.

        resume: auto, required or never. Raises ConfigError when it forbids that, or when the identity differs.
        """
        marker = self._marker
        if not marker.exists():
            if resume == "required":
                raise ConfigError(f"{self.output} holds no run to continue (resume=required)")
            self._refuse_foreign()
            publish_json(marker, {**identity, WRITER: VERSION})
            return False
        if resume == "never":
            raise ConfigError(f"{self.output} holds a run already (resume=never)")
        self._check_same(identity, self.identity().keys())
        self._sweep()
        return True

    def identity(self) -> dict[str, Any]:
        """The identity of the run in this directory, as it was last. Raises ConfigError when there is none."""
        if not self._marker.exists():
            raise ConfigError(f"{self.output} holds no run; a recipe can be changed from a block on where there is one")
        return without_writer(read_json(self._marker))

    def change(self, identity: Mapping[str, Any], what: Collection[str], first: int) -> None:
        """Changes the entries `what` of the run's identity, and drops its finished blocks from `first` on.

        Raises ConfigError when other entries differ, too.
        """
        before = self.identity()
        self._check_same(identity, before.keys() - set(what))
        now = json.loads(json.dumps(identity))
        if any(before[name] != now[name] for name in what):
            self.reset_blocks(first)  # before run.json: a crash in between must not leave blocks of another recipe
            publish_json(self._marker, {**now, WRITER: VERSION})

    def _check_same(self, identity: Mapping[str, Any], names: Collection[str]) -> None:
        before, now = read_json(self._marker), json.loads(json.dumps(identity))
        different = differences({k: before[k] for k in names}, {k: now.get(k) for k in names})
        if different:
            writer = before.get(WRITER, FIRST)
            other = "" if writer == VERSION else f" of qe_dist {writer} (this is {VERSION})"
            raise ConfigError(
                f"{self.output} belongs to another run{other}, which differs in {'; '.join(different)}. Choose another "
                "output directory, or the same settings to continue it (--from-block changes the recipe from a block "
                "on)"
            )

    def _refuse_foreign(self) -> None:
        """Raises ConfigError for a directory of other files. One in which an earlier call could not even write run.json
        counts as empty."""
        if self.output.exists() and not self.output.is_dir():
            raise ConfigError(f"{self.output} is a file; choose an empty output directory")
        inside = self.output.rglob("*") if self.output.exists() else ()
        if any(p != self.root and self.locks not in (p, p.parent) and not p.name.endswith(".tmp") for p in inside):
            raise ConfigError(f"{self.output} exists and is not a run of ours; choose an empty output directory")

    def refresh(self) -> None:
        """Makes this host see what other hosts have finished or spooled (see `publish.refresh`)."""
        for folder in (self.finished, *(self.root / kind for kind in KINDS), *self._spools()):
            refresh(folder)

    @property
    def is_complete(self) -> bool:
        """Whether the checkpoint is assembled."""
        return (self.output / "config.json").exists()

    # -- activations

    def _spools(self, kinds: Collection[SpoolKind] = KINDS) -> list[Path]:
        return [folder for kind in kinds for folder in (self.root / kind).glob("block-*")]

    def _batch_path(self, block: int, index: int, kind: SpoolKind) -> Path:
        return self.root / kind / f"block-{block:05d}" / f"batch-{index:05d}.safetensors"

    def has_batch(self, block: int, index: int, kind: SpoolKind = "activations") -> bool:
        """Whether a batch is spooled as input of a block: the first one of a wave, or one that is to be tuned."""
        return self._batch_path(block, index, kind).exists()

    def put_batch(self, block: int, batch: Batch, kind: SpoolKind = "activations") -> None:
        publish_sealed(self._batch_path(block, batch.index, kind), batch.tensors())

    def get_batch(self, block: int, index: int, kind: SpoolKind = "activations") -> Batch:
        """The batch as it was put. Raises TemporaryFileError for a damaged one, and removes it, so that a continued
        run makes it again."""
        path = self._batch_path(block, index, kind)
        if not path.exists():  # or this host does not see it yet
            self.refresh()
        try:
            return Batch.from_tensors(read_sealed(path))
        except CheckpointError as error:
            path.unlink(missing_ok=True)
            raise TemporaryFileError(f"{error}; it is removed, type the same command again to make it anew") from None

    def last_spooled(self, block: int, num_batches: int) -> int:
        """The last block up to `block` whose input is spooled completely; 0 if there is none."""
        return next((b for b in range(block, 0, -1) if self.has_batches(b, num_batches)), 0)

    def has_batches(self, block: int, num_batches: int, kind: SpoolKind = "activations") -> bool:
        """Whether the input of a block is spooled completely."""
        return all(self.has_batch(block, index, kind) for index in range(num_batches))

    def drop_batches_before(self, block: int, kind: SpoolKind = "activations", after: int = -1) -> None:
        """Removes the inputs of all blocks before this one, of those behind block `after` alone."""
        for folder in self._spools((kind,)):
            if after < _index(folder) < block:
                shutil.rmtree(folder, ignore_errors=True)

    # -- the training of a block that is being tuned

    def _training_path(self, block: int) -> Path:
        return self.trainings / f"{self.block_name(block)}.safetensors"

    def put_training(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Publishes the training of a block in the place of an earlier one."""
        publish_sealed(self._training_path(block), tensors)

    def training(self, block: int) -> dict[str, Tensor] | None:
        """The training of a block as it was last put; None where there is none. A damaged one is removed, with a
        warning: the block is then tuned from its start, to the same bytes."""
        path = self._training_path(block)
        refresh(self.trainings)
        if not path.exists():
            return None
        try:
            return read_sealed(path)
        except CheckpointError as error:
            log.warning("%s; it is removed, and the block is tuned from its start", error)
            path.unlink(missing_ok=True)
            return None

    def drop_training(self, block: int) -> None:
        """Removes the training of a block, if there is one."""
        self._training_path(block).unlink(missing_ok=True)

    # -- finished files: a safetensors file, and a report that is published after it

    def put_file(self, name: str, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """Publishes NAME.safetensors, then its report, to which size, hash, and the hash of each tensor are added."""
        path = self.finished / f"{name}.safetensors"
        whole = publish_tensors(path, tensors)
        each = {k: digest({k: v}) for k, v in sorted(tensors.items())}
        hashes = {"sha256": whole, "bytes": path.stat().st_size, "tensors": each}
        publish_json(self._report_path(name), {**report, **hashes})

    def has_file(self, name: str) -> bool:
        """Whether a file is finished: its report is published after its tensors."""
        return self._report_path(name).exists()

    def file_report(self, name: str) -> dict[str, Any]:
        """The report of a finished file. Raises CheckpointError when it is missing or damaged."""
        return read_json(self._report_path(name))

    def place(self, name: str) -> Path:
        """Path of a finished file: in blocks/ until `assemble` moves it up to OUTPUT, where an older one may lie."""
        file = f"{name}.safetensors"
        return next((p for p in (self.finished / file, self.output / file) if p.exists()), self.finished / file)

    def forget_file(self, name: str) -> None:
        """Removes a file and its report. The report is removed first, so that a crash leaves no finished file."""
        file = f"{name}.safetensors"
        for path in (self._report_path(name), self.finished / file, self.output / file):
            path.unlink(missing_ok=True)

    def check_files(self) -> list[str]:
        """Compares every finished file with the hash in its report. Removes damaged ones, so that they alone are made
        again, and returns what is wrong with each. Reads each file once, several at a time."""
        self.refresh()
        names = sorted(p.stem for p in self.finished.glob("*.json"))
        with ThreadPoolExecutor() as pool:
            faults = list(pool.map(self._fault, names))
        for name in (n for n, fault in zip(names, faults, strict=True) if fault):
            self.forget_file(name)
        return [fault for fault in faults if fault]

    def _fault(self, name: str) -> str:
        """What is wrong with a finished file; empty when nothing is."""
        path = self.place(name)
        try:
            report = self.file_report(name)
            size, expected = report["bytes"], report["sha256"]
        except (CheckpointError, KeyError, TypeError):
            return f"the report {self._report_path(name)} is damaged"
        if not path.exists():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} is damaged: expected {size} bytes, found {path.stat().st_size}"
        found = sha256(path)
        return "" if found == expected else f"{path} is damaged: SHA-256 expected {expected}, found {found}"

    def _report_path(self, name: str) -> Path:
        return self.finished / f"{name}.json"

    # -- blocks

    def block_name(self, index: int) -> str:
        return f"block-{index:05d}"

    def has_block(self, index: int) -> bool:
        return self.has_file(self.block_name(index))

    def put_block(self, index: int, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        self.put_file(self.block_name(index), tensors, report)

    def block_report(self, index: int) -> dict[str, Any]:
        return self.file_report(self.block_name(index))

    def reset_blocks(self, first: int) -> None:
        """Removes the finished blocks from `first` on, and the config.json of an assembled checkpoint."""
        (self.output / "config.json").unlink(missing_ok=True)
        for report in self.finished.glob("block-*.json"):
            if _index(report) >= first:
                self.forget_file(report.stem)

    def clean(self) -> None:
        """Removes what only a continued run would need."""
        for folder in (*(self.root / kind for kind in KINDS), self.trainings):
            shutil.rmtree(folder, ignore_errors=True)
        self._sweep()

    def _sweep(self) -> None:
        """Removes the temporary files of writers that were killed."""
        for left in self.output.rglob(".*.tmp"):
            left.unlink(missing_ok=True)


def _index(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def without_writer(said: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a run, from its run.json."""
    return {name: value for name, value in said.items() if name != WRITER}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names each entry that differs by its path of keys, with both values."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({a!r} then, {b!r} now)")
    return found
