"""What a run shows while it works: a bar with time left, a line per finished block, a summary."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qe_dist.core.errors import ConfigError

log = logging.getLogger("qe_dist")
log.addHandler(logging.NullHandler())  # without a log file, nothing


def set_up_logging(log_file: Path | None) -> None:
    """Our own lines to the file; the chatter of libraries to nobody."""
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
    """Listens to the driver."""

    def __init__(self, console: Console, bar: Progress, lines: bool = True) -> None:
        self.console, self.bar, self.lines = console, bar, lines
        self.stream = self.fit = None

    def without_lines(self) -> "RunView":
        """The bar alone, for a caller that prints its own table."""
        return RunView(self.console, self.bar, lines=False)

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        if event == "start":
            self.stream = self.bar.add_task("stream", total=data["batches"] * data["waves"])
            self.fit = self.bar.add_task("fit blocks", total=data["blocks"], completed=data["done"])
        elif event == "batch":
            self.bar.advance(self.stream)
        elif event == "block":
            self.bar.advance(self.fit)
            line = block_line(data)
            log.info(line)
            if self.lines:
                self.console.print(line, highlight=False)


def block_line(report: dict[str, Any]) -> str:
    errors = {g.rsplit(".")[-1]: r["error"] for g, r in report["groups"].items()}
    parts = [f"{g} {'unmeasured' if e is None else format(e, '.4f')}" for g, e in errors.items()]
    note = f"  {len(report['fallbacks'])} fall-backs" if report["fallbacks"] else ""
    return f"block {report['index']:>3}  {report['seconds']:6.1f} s  error  {'  '.join(parts)}{note}"


@contextmanager
def run_view(quiet: bool) -> Iterator[RunView]:
    console = Console(quiet=quiet)
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield RunView(console, bar)
