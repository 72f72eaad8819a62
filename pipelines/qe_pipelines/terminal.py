"""What a command says, wherever its output goes: full devices, closed pipes, terminals without Unicode, and faults of
our own, of which a terminal shows one line and a file the traceback."""

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from qe_dist.core.errors import TemporaryError


class OutputError(TemporaryError):
    """Standard output took no more: the same command says it again."""


class _Told:
    """Standard output whose failure is an error of ours: libraries end the process in ways of their own for a closed
    pipe, and say nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._doing(self._stream.write, text)

    def flush(self) -> None:
        self._doing(self._stream.flush)

    def _doing(self, do: Any, *given: Any) -> Any:
        try:
            return do(*given)
        except OSError as error:
            raise OutputError(f"standard output could not be written: {error.strerror}") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lenient_output() -> Iterator[None]:
    """While it is open, characters that a terminal does not know are written as escapes, and what cannot be written
    raises OutputError."""
    before = sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if before is not None:
        sys.stdout = _Told(before)
    try:
        yield
    finally:
        sys.stdout = before


def flush_output() -> None:
    """Writes what is still held back. Raises OutputError."""
    if sys.stdout is not None:
        sys.stdout.flush()


def give_up_output() -> None:
    """After an OutputError: what is held back goes nowhere, so that Python does not complain when it ends."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str) -> None:
    """A line on standard error, if that takes it."""
    with suppress(OSError, AttributeError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def keep_traceback(error: BaseException) -> str:
    """Writes the traceback into a file of its own. Returns what to tell about it."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="qe-dist-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(text)
        return f"its traceback is in {file.name}"
    except OSError:
        return "its traceback could not be kept; --debug shows it"
