"""The journal of a run: a JSON line for every event of the driver, in OUTPUT/.run/journal.jsonl.

`qe-dist status` shows it; no run depends on it. So records are not synced to disk, and a record that cannot be written
is left out instead of ending the run.
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
"""Parts of a block's report that are left out since they are long; the block's own report has them."""


@dataclass(frozen=True)
class Record:
    """One event."""

    call: str
    """Id of the call of the command. All calls that continue a run share its journal."""
    time: str
    """Wall clock, to show. It may jump, so durations are differences of `elapsed`."""
    elapsed: float
    """Seconds since the call began, by a clock that never jumps."""
    event: str
    data: Mapping[str, Any]


class Journal:
    """A listener of the driver that appends every event to a file. Only one process may write to it at a time."""

    def __init__(self, path: Path, listen: Callable[[str, dict[str, Any]], None] = lambda *_: None) -> None:
        """listen: gets an event `note` the first time that the journal cannot be written."""
        self.path, self.listen = path, listen
        self.call, self.begin = uuid.uuid4().hex[:12], monotonic()
        self.complained = False
        self.heard: dict[int, float] = {}
        """Seconds of the call when each worker's usage was last written."""

    def __call__(self, event: str, data: Mapping[str, Any]) -> None:
        elapsed = monotonic() - self.begin
        if event == "worker" and not self._is_due(data["worker"], elapsed):
            return
        if event == "lost":
            self.heard.pop(data["worker"], None)  # the first event of its replacement is written at once
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
        """Whether to write the usage of a worker. Workers report every few seconds; one report per second is written,
        of any number of workers."""
        if elapsed - self.heard.get(worker, -math.inf) < len(self.heard):
            return False
        self.heard[worker] = elapsed
        return True


def now() -> str:
    """The wall clock, in ISO format."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _append(path: Path, line: bytes) -> None:
    """Opens and closes the file each time, since on NFS other hosts see a line only after the file is closed."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = end > 0 and file.read(1) != b"\n"  # by a full disk, or a writer that was killed
        file.write(b"\n" * torn + line + b"\n")


def read_journal(path: Path, start: int = 0) -> tuple[list[Record], int]:
    """Returns the records from byte `start` on, and the byte to go on from. Skips damaged lines. A last line without
    its end is left for the next call, since it may still be being written."""
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
