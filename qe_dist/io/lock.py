"""One run per directory: a lock with owner and heartbeat, on local disks and on NFS.

The lock is a folder of numbered files, and the owner is who made the highest. To take it is to create the next number
exclusively, so of several takers one wins; no file is moved or removed that another may hold, and an owner who finds a
higher number has lost.

An owner counts as gone when it is known to be (same machine, no such process), or when its counter stands still through
`patience` sleeps of the observer. No clock is compared with another, so one that jumps neither steals nor blocks.

filelock's SoftFileLease follows the same rule for clocks, but needs renameat2(RENAME_EXCHANGE) to take over a stale
lock, which NFS refuses: there the lock of a killed run would stay for ever.
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

from qe_dist.core.errors import CheckpointError, ConfigError, QEError
from qe_dist.io.publish import make_folder

BEAT = 5.0
"""Seconds between two heartbeat."""
PATIENCE = 12
"""Beats without one after which an owner on another machine counts as gone."""


@dataclass(frozen=True)
class Owner:
    id: str
    host: str
    machine: str
    """Within which a process id means the same process; empty where that is not known."""
    pid: int
    started: str
    """Ticks from boot to the start of the process: unlike a time of day, no clock changes it."""
    since: str
    """For people alone."""
    beat: int = 0
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
        """Provably: what cannot be known counts as there."""
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
    """Held within `with`. ConfigError names the owner where another run holds it."""

    def __init__(self, folder: Path, beat: float = BEAT, patience: int = PATIENCE) -> None:
        self.folder, self.beat, self.patience = folder, beat, patience
        self._stop, self._lost = threading.Event(), threading.Event()

    @property
    def lost(self) -> bool:
        """Taken over by another run, because this one gave no heartbeat."""
        return self._lost.is_set()

    def check(self) -> None:
        """To be asked before anything is published. QEError once the lock is lost."""
        if self.lost:
            raise QEError(
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
            raise CheckpointError(
                f"{self.folder} could not be written: {error.strerror}; free some space (or mend the permissions) and "
                "type the same command again"
            ) from None
        self._thread = threading.Thread(target=self._live, name="run lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """The file stays, marked: numbers only grow, else a slow taker could make one a second time."""
        self._stop.set()
        self._thread.join()
        if self._last() == self.number:
            said = json.dumps(asdict(replace(self.owner, released=True)))
            with contextlib.suppress(OSError), self._path(self.number).open("r+") as file:
                file.write(said + " ")  # in place, as a full disk has no room for another; covers "false" by "true"

    def _take(self) -> int:
        while True:
            number = self._last()
            self._wait(number)
            if self._create(number + 1):
                if self._last() == number + 1:
                    return number + 1
                self._path(number + 1).unlink(missing_ok=True)  # others were faster by more than one

    def _wait(self, number: int) -> None:
        """Returns once the owner of this number is gone or another took it over; ConfigError once it shows life."""
        first = self._read(number)
        for watched in range(self.patience + 1):
            if watched > 0:
                time.sleep(self.beat)
            owner = self._read(number)
            if number == 0 or self._last() != number or (owner and owner.is_gone):
                return
            if owner and (owner.is_local or owner != first):
                raise ConfigError(
                    f"{self.folder.parent.parent} is in use by {owner}; wait for it or end it, or choose another "
                    "output directory"
                )

    def _live(self) -> None:
        while not self._stop.wait(self.beat):
            with contextlib.suppress(OSError):  # a full disk or a server that is away is no loss yet
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
        """None where there is none, or nothing readable: being written, or damaged."""
        try:
            return Owner(**json.loads(self._path(number).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _create(self, number: int) -> bool:
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
        """By rename: read whole or not at all, and an NFS client that changed a folder sees what others did there."""
        temporary = self.folder / f".{self.number}.{uuid.uuid4().hex}.tmp"
        try:
            temporary.write_text(json.dumps(asdict(owner)))
            os.replace(temporary, self._path(self.number))
        finally:
            temporary.unlink(missing_ok=True)


def _machine() -> str:
    """This boot of this kernel, and the namespace of process ids in it: containers share a host's name, not its ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, str]:
    """State and start of a process, in ticks since boot; empty where not known."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return after_name[0], after_name[19]
    except OSError:
        return "", ""
