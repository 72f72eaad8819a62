"""The memory of a command and of all processes that it starts, sampled until it ends.

Proportional set sizes (PSS) share what is mapped by several processes between them, so their sum is what the command
takes of the machine. Ray's object store lives in shared memory: its pages count whether or not a living process has
them mapped. Page cache of files that nobody maps is the kernel's and is not counted.
"""

import os
import re
import subprocess
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = "QE_MEMORY_OF"
"""Variable by which the processes of a command are known: all that it starts inherit it, orphans too."""
MIB = 2**20
DRIVER, RAY, STORE = "driver", "ray", "object store"
"""Kinds beside the actors, each of which goes by its class. `ray` is raylet, control store, agents and idle workers."""


@dataclass(frozen=True)
class Sample:
    seconds: float
    mib: Mapping[str, float]
    """By kind of process, without shared memory, which is the object store's."""

    @property
    def total(self) -> float:
        return sum(self.mib.values())


@dataclass
class Watched:
    """What a command took; `code` is its exit status."""

    code: int = 0
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    largest_mib: float = 0.0
    """Of any one process at any time, shared memory left out as in `Sample`."""

    @property
    def peak(self) -> Sample:
        return max(self.samples, key=lambda s: s.total)

    def peak_without(self, kind: str) -> Sample:
        """The highest while no process of this kind lived."""
        return max((s for s in self.samples if kind not in s.mib), key=lambda s: s.total)

    @property
    def peaks(self) -> dict[str, float]:
        """Of each kind alone; they need not fall together."""
        kinds = sorted({k for s in self.samples for k in s.mib})
        return {k: max(s.mib.get(k, 0.0) for s in self.samples) for k in kinds}


def watch(command: Sequence[str], log: Path, interval: float = 0.2) -> Watched:
    """Runs the command to its end, its output into `log`; a sample each `interval` seconds."""
    mark, watched, start = uuid.uuid4().hex, Watched(), time.monotonic()
    known: dict[psutil.Process, bool | None] = dict.fromkeys(psutil.process_iter(), False)
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=os.environ | {MARK: mark}, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            seen = {p: known.get(p) for p in psutil.process_iter()}
            known = {p: _is_marked(p, mark) if ours is None else ours for p, ours in seen.items()}
            mib, largest = _mib_by_kind(p for p, ours in known.items() if ours)
            watched.samples.append(Sample(time.monotonic() - start, mib))
            watched.largest_mib = max(watched.largest_mib, largest)
            time.sleep(interval)
    watched.code, watched.seconds = process.returncode, time.monotonic() - start
    return watched


def _is_marked(process: psutil.Process, mark: str) -> bool | None:
    """None where it cannot be known yet: while a program takes the place of another, it has no environment."""
    try:
        environment = process.environ()
    except psutil.Error:
        return False
    return environment.get(MARK) == mark if environment else None


def _mib_by_kind(processes: Iterable[psutil.Process]) -> tuple[dict[str, float], float]:
    """The sums, and the largest process."""
    mib: dict[str, float] = defaultdict(float)
    shared, store, largest = 0.0, 0.0, 0.0
    for process in processes:
        try:
            line = " ".join(process.cmdline())
            pss = _pss(process.pid)
            store = max(store, _store_mib(process.pid))
        except (psutil.Error, OSError):  # it has just ended
            continue
        own = pss["Pss"] - pss["Pss_Shmem"]
        mib[_kind(line)] += own
        largest = max(largest, own)
        shared += pss["Pss_Shmem"]
    return {**mib, STORE: max(shared, store)}, largest


def _kind(line: str) -> str:
    """Of the process with this command line. Ray writes the class of an actor there: `ray::StageActor.forward`."""
    if line.startswith("ray::"):
        name = re.split(r"\W", line.removeprefix("ray::"))[0]
        return RAY if name == "IDLE" or name.endswith("Agent") else name.removesuffix("Actor").lower()
    return DRIVER if "qe_pipelines" in line else RAY


def _pss(pid: int) -> dict[str, float]:
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines if words[0].startswith("Pss")}


def _store_mib(pid: int) -> float:
    """Pages of the store's files that this process has open; they are unlinked and known by their descriptors alone."""
    files = [d for d in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(d).startswith("/dev/shm/plasma")]
    return sum({(s.st_dev, s.st_ino): s.st_blocks * 512 / MIB for s in (d.stat() for d in files)}.values())
