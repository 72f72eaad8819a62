"""One run per directory: a lock with owner and heartbeat, on local disks and on NFS.

The lock is a folder of numbered files. The process that made the file with the highest number owns the lock. A process
takes the lock by creating the next number exclusively, so of several takers one wins. No file is moved or removed that
another process may own, and an owner that finds a higher number has lost the lock.

An owner counts as gone when it is known to have ended (same machine, no such process), or when its count of heartbeats
does not change while the observer sleeps `missed_heartbeats` times. Clocks of two machines are never compared, so a
clock that jumps does no harm.

filelock's SoftFileLease follows the same rule for clocks, but needs renameat2(RENAME_EXCHANGE) to take over a stale
lock. NFS refuses that, so there the lock of a killed run would stay for ever.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from qe_dist.core.errors import ConfigError, TemporaryError
from qe_dist.io.publish import cannot_write, make_folder

HEARTBEAT_SECONDS = 5.0
"""Time between two heartbeats."""
MISSED_HEARTBEATS = 12
"""An owner on another machine counts as gone after so many intervals without a heartbeat."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock, as its file describes it."""

    id: str
    host: str
    machine: str
    """Processes with equal `machine` share process ids; empty where that is not known."""
    pid: int
    started: str
    """Ticks from boot to the start of the process; no change of a clock affects them."""
    since: str
    """Wall clock, for messages only."""
    beat: int = 0
    """Number of heartbeats so far."""
    released: bool = False

    @classmethod
    def this_process(cls) -> "Owner":
        pid, now = os.getpid(), datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), pid, _process(pid)[1], now)

    @property
    def is_local(self) -> bool:
        return self.machine != "" and self.machine == _machine()

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to have ended or to have released the lock. False when that is not known."""
        if self.released:
            return True
        if not self.is_local:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        state, started = _process(self.pid)
        return state == "Z" or (started != "" and started != self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class RunLock:
    """A context manager that holds the lock.

    Entering raises ConfigError, which names the owner, when another run holds the lock, and CheckpointError when the
    folder cannot be written.
    """

    def __init__(
        self, folder: Path, heartbeat_seconds: float = HEARTBEAT_SECONDS, missed_heartbeats: int = MISSED_HEARTBEATS
    ) -> None:
        self.folder, self.heartbeat_seconds, self.missed_heartbeats = folder, heartbeat_seconds, missed_heartbeats
        self._stop, self._lost = threading.Event(), threading.Event()

    @property
    def lost(self) -> bool:
        """Whether another run took the lock over, because this one gave no heartbeat."""
        return self._lost.is_set()

    def check(self) -> None:
        """Raises TemporaryError when the lock is lost. To be called before anything is published."""
        if self.lost:
            raise TemporaryError(
                f"{self.folder} was taken over by {self._read(self._last()) or 'another run'} while this run gave no "
                "heartbeat; this one ends, and finished blocks are safe"
            )

    def __enter__(self) -> "RunLock":
        self.owner = Owner.this_process()
        try:
            make_folder(self.folder)
            self.number = self._take()
            for number in self._numbers():
                if number < self.number:
                    self._path(number).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        self._thread = threading.Thread(target=self._give_heartbeats, name="run lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Marks the file as released. It stays, since numbers must only grow: a slow taker could create one again."""
        self._stop.set()
        self._thread.join()
        if self._last() == self.number:
            said = json.dumps(asdict(replace(self.owner, released=True)))
            with contextlib.suppress(OSError), self._path(self.number).open("r+") as file:
                file.write(said + " ")  # in place, since a full disk has no room for a file; as long as with "false"

    def _take(self) -> int:
        """Waits until the last owner is gone, and returns the number of the file that this process created."""
        while True:
            number = self._last()
            self._wait(number)
            if self._create(number + 1):
                if self._last() == number + 1:
                    return number + 1
                self._path(number + 1).unlink(missing_ok=True)  # others were faster by more than one

    def _wait(self, number: int) -> None:
        """Returns when the owner of this number is gone or has lost the lock. Raises ConfigError when it is alive."""
        first = self._read(number)
        for watched in range(self.missed_heartbeats + 1):
            if watched > 0:
                time.sleep(self.heartbeat_seconds)
            owner = self._read(number)
            if number == 0 or self._last() != number or (owner and owner.is_gone):
                return
            if owner and (owner.is_local or owner != first):
                raise ConfigError(
                    f"{self.folder.parent.parent} is in use by {owner}; wait for it or end it, or choose another "
                    "output directory"
                )

    def _give_heartbeats(self) -> None:
        while not self._stop.wait(self.heartbeat_seconds):
            with contextlib.suppress(OSError):  # the lock is not lost when a disk is full or a server does not answer
                if self._last() != self.number:
                    self._lost.set()
                    return
                self.owner = replace(self.owner, beat=self.owner.beat + 1)
                self._write(self.owner)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}"

    def _numbers(self) -> list[int]:
        return [int(p.name) for p in self.folder.glob("[0-9]*")]

    def _last(self) -> int:
        return max(self._numbers(), default=0)

    def _read(self, number: int) -> Owner | None:
        """The owner of this number; None when there is no file, or when it is being written or damaged."""
        try:
            return Owner(**json.loads(self._path(number).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _create(self, number: int) -> bool:
        """Creates the file of this number; False when it exists already."""
        try:
            handle = os.open(self._path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with open(handle, "w") as file:
                file.write(json.dumps(asdict(self.owner)))
        except OSError:
            self._path(number).unlink(missing_ok=True)
            raise
        return True

    def _write(self, owner: Owner) -> None:
        """Writes by rename, so that readers see all or nothing. An NFS client that changed a folder also sees what
        others did there."""
        temporary = self.folder / f".{self.number}.{uuid.uuid4().hex}.tmp"
        try:
            temporary.write_text(json.dumps(asdict(owner)))
            os.replace(temporary, self._path(self.number))
        finally:
            temporary.unlink(missing_ok=True)


def _machine() -> str:
    """This boot of this kernel and its namespace of process ids: containers may share a host's name, not its ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, str]:
    """State of a process, and its start in ticks since boot; both empty where they are not known."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return after_name[0], after_name[19]
    except OSError:
        return "", ""
