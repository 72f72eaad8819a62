"""`qe-dist status`: how a run is doing, read from its files by any terminal that sees them."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.flow.progress import RunState, read_state
from qe_dist.io.journal import JOURNAL, read_journal

if TYPE_CHECKING:
    from qe_dist.io.lock import Owner

REFRESH_SECONDS = 1.0
SILENCE_SECONDS = 600.0
"""A run without a lock counts as dead after so long without an event: a batch or block takes less."""
CONTINUE = "type the same command again to continue"


def status(
    run_dir: Annotated[Path, typer.Argument(help="the --output of a quantize that runs, ran or was killed")],
    once: Annotated[bool, typer.Option("--once", help="print and exit, as when the output is no terminal")] = False,
) -> None:
    """Show how the run in RUN_DIR is doing, until it ends or Ctrl-C. Reads files only."""
    console = Console(width=None if sys.stdout.isatty() else 200)  # a pipe has no width; rich would fold at 80
    views = watch(run_dir)
    if once or not console.is_terminal:
        console.print(next(views))
        return
    try:
        with Live(console=console, auto_refresh=False) as live:
            for view in views:
                live.update(view, refresh=True)
                time.sleep(REFRESH_SECONDS)
    except KeyboardInterrupt:
        pass


def watch(run_dir: Path) -> Iterator[RenderableType]:
    """Yields a view of the run each time it is asked, until the run has ended.

    Raises ConfigError when `run_dir` holds no run, and CheckpointError for a journal of another version.
    """
    from qe_dist.io.run_dir import RunDir

    run = RunDir(run_dir)
    path = run.root / JOURNAL
    if not path.is_file():
        raise ConfigError(f"{run_dir} is no run: expected {path}; give the --output of a qe-dist quantize")
    state, place, alive = RunState(), 0, True
    while alive:
        records, place = read_journal(path, place)
        try:
            state = read_state(records, state)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is of another version of qe_dist: {error!r}") from None
        condition = judge(state, heartbeat(state, run.locks))
        alive = condition.alive
        yield picture(run_dir, state, condition)


# -- alive or not


@dataclass(frozen=True)
class Heartbeat:
    """What files say of the driver, besides its own events."""

    owner: "Owner | None"
    """The process that holds the lock of the run, or held it last."""
    quiet: float
    """Seconds since the last heartbeat of the owner; without an owner, since the last event in the journal."""


@dataclass(frozen=True)
class Condition:
    """Whether a run goes on, in words."""

    alive: bool
    text: str
    style: str


def heartbeat(state: RunState, locks: Path) -> Heartbeat:
    """The last heartbeat of a run. Compares the clocks of two hosts when the run is on another one: that is good enough
    to show, and not to take the lock over."""
    from qe_dist.io.lock import Owner

    newest = max(locks.glob("[0-9]*"), default=None)
    if newest is not None:
        with contextlib.suppress(OSError, ValueError, TypeError):  # it is being taken
            return Heartbeat(Owner(**json.loads(newest.read_text())), time.time() - newest.stat().st_mtime)
    last = datetime.fromisoformat(state.time).timestamp() if state.time else time.time()
    return Heartbeat(None, time.time() - last)


def judge(state: RunState, last: Heartbeat) -> Condition:
    """Whether the run goes on. The journal alone does not tell: a driver that was killed wrote no last event."""
    if state.end == "done":
        return Condition(False, "finished", "green")
    missing = _missing(last)
    if missing is None and (last.owner or state.end is None):  # after a `stop` too: it is about to end, or begun again
        return Condition(True, f"running: {last.owner or 'an unknown process'}", "bold")
    if state.end == "stop":
        return Condition(False, f"stopped: {state.reason}; {CONTINUE}", "yellow")
    return Condition(False, f"{missing}; {CONTINUE}", "red")


def _missing(last: Heartbeat) -> str | None:
    """How the driver ended; None when it seems to be alive."""
    from qe_dist.io.lock import HEARTBEAT_SECONDS, MISSED_HEARTBEATS

    owner, name = last.owner, last.owner or "an unknown process"
    if owner is not None and owner.is_gone:
        return f"ended early, without a last word: {name}" if owner.released else f"dead: {name}"
    if last.quiet > (SILENCE_SECONDS if owner is None else HEARTBEAT_SECONDS * MISSED_HEARTBEATS):
        return f"probably dead: no heartbeat for {duration(last.quiet)} of {name}"
    return None


# -- what it looks like


def picture(run_dir: Path, state: RunState, condition: Condition) -> RenderableType:
    """The view of a run: its state, and a table of its workers while it goes on."""
    head = Table.grid(padding=(0, 2))
    head.add_row(Text(str(run_dir)), Text(condition.text, style=condition.style))
    for name, text in _lines(state):
        head.add_row(name, Text(text))
    return Group(head, _workers(state)) if state.workers and condition.alive else head


def _lines(state: RunState) -> Iterator[tuple[str, str]]:
    wave = state.wave
    yield "call", f"{state.calls}, since {state.began}; last word after {duration(state.elapsed)}"
    yield "blocks", f"{state.done} of {state.blocks} finished"
    if wave is not None and state.end is None:
        rate = wave.tokens_per_second
        yield "wave", f"{wave.number} of {state.waves}, blocks {span(wave.first, wave.last)}"
        yield "batches", f"{wave.batches} of {state.batches}" + (f", {rate:,.0f} tokens per second" if rate else "")
        yield "time left", time_left(state)
    if state.lost:
        last = state.lost[-1]
        yield "lost", f"{len(state.lost)}, last worker {last.worker} on {last.node} at {last.time}: {last.reason}"
    if state.fallbacks:
        layer, steps = list(state.fallbacks.items())[-1]
        yield "fall-backs", f"{len(state.fallbacks)}, last {layer}: {'; '.join(steps)}"
    for note in state.notes:
        yield "note", note


def _workers(state: RunState) -> Table:
    table = Table("worker", "node", "blocks", "doing", "memory", "peak")
    for number, worker in sorted(state.workers.items()):
        blocks = span(worker.blocks[0], worker.blocks[-1]) if worker.blocks else ""
        style = "red" if worker.activity == "lost" else None
        row = (str(number), worker.node, blocks, worker.activity, mib(worker.memory_mib), mib(worker.peak_mib))
        table.add_row(*map(Text, row), style=style)
    return table


def time_left(state: RunState) -> str:
    """The estimate of the time left; a lower bound before every part was measured."""
    left = state.left
    return duration(left.seconds) if left.whole else f"over {duration(left.seconds)} (not all is measured yet)"


def span(first: int, last: int) -> str:
    """A range of blocks, both ends included."""
    return str(first) if first == last else f"{first}-{last}"


def mib(value: float | None) -> str:
    """MiB with a unit; empty for None."""
    if value is None:
        return ""
    return f"{value:.0f} MiB" if value < 10 * 1024 else f"{value / 1024:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds in their largest unit and the one below."""
    left = round(seconds)
    counts: list[tuple[int, str]] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or counts:
            counts.append((count, unit))
    return " ".join(f"{count} {unit}" for count, unit in counts[:2] if count) or "0 s"
