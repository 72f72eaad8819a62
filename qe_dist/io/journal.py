"""The journal of a run: a JSON line for every event of the driver, in OUTPUT/.run/journal.jsonl.

It tells people how a run is doing (`qe-dist status`) and how it went; nothing is ever computed from it. So it is not
synced to disk record by record, and a record that cannot be written is left out: no run is worth less than its log.
"""

import json
import math
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

JOURNAL = "journal.jsonl"
"""Its name in the .run folder."""
LEFT_OUT = ("layout", "tensors")
"""Parts of a block's report that are as long as the model is deep; they are in the block's own file."""


@dataclass(frozen=True)
class Record:
    """One event."""

    call: str
    """Which call of the command: they continue each other's run, in one journal."""
    time: str
    """Of the wall clock, for people. It may jump: differences are taken of `elapsed`."""
    elapsed: float
    """Seconds of this call, of a clock that never jumps."""
    event: str
    data: Mapping[str, Any]


class Journal:
    """A listener of the driver that appends every event to a file. One at a time writes there."""

    def __init__(self, path: Path, listen: Callable[[str, dict[str, Any]], None] = lambda *_: None) -> None:
        """listen: is told (event `note`) when the journal cannot be written, the first time that it happens."""
        self.path, self.listen = path, listen
        self.call, self.begin = uuid.uuid4().hex[:12], monotonic()
        self.complained = False
        self.heard: dict[int, float] = {}
        """When a worker's state was last written."""

    def __call__(self, event: str, data: Mapping[str, Any]) -> None:
        elapsed = monotonic() - self.begin
        if event == "worker" and not self._is_due(data["worker"], elapsed):
            return
        if event == "lost":
            self.heard.pop(data["worker"], None)  # its successor is heard at once
        kept = {key: value for key, value in data.items() if key not in LEFT_OUT}
        record = Record(self.call, now(), round(elapsed, 3), event, kept)
        try:
            _append(self.path, json.dumps(vars(record)).encode())
        except OSError as error:
            if not self.complained:
                self.complained = True
                why = error.strerror or error
                self.listen("note", {"text": f"{self.path} cannot be written ({why}); the run goes on without it"})

    def _is_due(self, worker: int, elapsed: float) -> bool:
        """Workers tell how they are every few seconds; written is one of them per second, however many they are."""
        if elapsed - self.heard.get(worker, -math.inf) < len(self.heard):
            return False
        self.heard[worker] = elapsed
        return True


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _append(path: Path, line: bytes) -> None:
    """Opened and closed each time: on NFS, closing is what shows a line to other hosts."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = end > 0 and file.read(1) != b"\n"  # by a full disk, or a writer that was killed
        file.write(b"\n" * torn + line + b"\n")


def read_journal(path: Path, start: int = 0) -> tuple[list[Record], int]:
    """The records from byte `start` on, and where to go on reading. Skips what is torn, and leaves a last line without
    its end to the next reader: it may be about to be written."""
    with path.open("rb") as file:
        file.seek(start)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    records = (_record(line) for line in whole.split(b"\n"))
    return [record for record in records if record], start + len(whole)


def _record(line: bytes) -> Record | None:
    try:
        return Record(**json.loads(line))
    except (ValueError, TypeError):
        return None
