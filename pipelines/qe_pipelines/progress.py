"""The view of a command on its run: bars with the time left, a line per finished block, and a line per problem."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from qe_dist.core.errors import ConfigError
from qe_dist.flow.progress import RunState, step
from qe_dist.io.journal import Record
from qe_pipelines.status import time_left
from qe_pipelines.terminal import OutputError

log = logging.getLogger("qe_dist")
log.addHandler(logging.NullHandler())  # without a log file, lines go nowhere


def set_up_logging(log_file: Path | None) -> None:
    """Sends our log lines to a file, if one is given, and silences libraries.

    Raises ConfigError when the file cannot be written.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if log_file is not None:
        try:
            handler = logging.FileHandler(log_file)
        except OSError as error:
            raise ConfigError(f"--log-file {log_file} cannot be written: {error.strerror}") from None
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


class RunView:
    """A listener of the driver that shows its events."""

    def __init__(self, console: Console, bar: Progress, lines: bool = True) -> None:
        self.console, self.bar, self.lines = console, bar, lines
        self.state, self.begin = RunState(), monotonic()

    def without_lines(self) -> "RunView":
        """The view without a line per block, for a caller that prints its own table."""
        return RunView(self.console, self.bar, lines=False)

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        self.state = step(self.state, Record("", "", monotonic() - self.begin, event, data))
        if event == "start":
            self.stream = self.bar.add_task("stream", total=None, left="")
            self.fit = self.bar.add_task("fit blocks", total=self.state.blocks, left="")
        if self.state.blocks:
            self._move_bars()
        line = line_of(event, data)
        if line is not None:
            log.info(line)
            if (self.lines or event != "block") and event != "stop":  # its reason is how the command ends
                self._print(line)

    def _print(self, line: str) -> None:
        """Once nobody takes the lines any more, the work goes on without them."""
        try:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        except OutputError:
            self.console.quiet = True

    def _move_bars(self) -> None:
        state, wave = self.state, self.state.wave
        if wave is not None:
            name = f"wave {wave.number} of {state.waves}"
            self.bar.update(self.stream, description=name, total=state.batches, completed=wave.batches)
        self.bar.update(self.fit, completed=state.done, left=time_left(state) if wave else "")


def line_of(event: str, data: Mapping[str, Any]) -> str | None:
    """The line of an event; None for an event without one."""
    match event:
        case "block":
            return block_line(data)
        case "lost":
            return f"lost worker {data['worker']} on {data['node']}: {data['reason']}"
        case "again":
            return f"wave {data['wave']} is streamed again, from batch {data['from_batch']}"
        case "note":
            return data["text"]
        case "stop":
            return f"stopped: {data['reason']}"
    return None


def block_line(report: Mapping[str, Any]) -> str:
    """The line of a finished block: seconds, error of each group, fall-backs."""
    errors = {g.rsplit(".")[-1]: r["error"] for g, r in report["groups"].items()}
    parts = [f"{g} {'unmeasured' if e is None else format(e, '.4f')}" for g, e in errors.items()]
    note = f"  {len(report['fallbacks'])} fall-backs" if report["fallbacks"] else ""
    tuned = f"  {tuning_note(report['tuning'])}" if "tuning" in report else ""
    return f"block {report['index']:>3}  {report['seconds']:6.1f} s  error  {'  '.join(parts)}{tuned}{note}"


def tuning_note(tuning: Mapping[str, Any]) -> str:
    """What tuning did for a block, from its report."""
    lost = f", {len(tuning['nonfinite'])} steps not finite" if tuning["nonfinite"] else ""
    if tuning["kept"] != "tuned":
        return f"not tuned: no step beat the closed form{lost}"
    return f"tuned in {tuning['step']} steps to {tuning['loss']:.2f} of its loss{lost}"


@contextmanager
def run_view(quiet: bool) -> Iterator[RunView]:
    """A view with bars, which disappear at the end. quiet: shows nothing."""
    console = Console(quiet=quiet)
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield RunView(console, bar)
