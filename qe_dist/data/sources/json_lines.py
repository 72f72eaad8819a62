"""JSON lines, one record each, or one JSON array of records."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qe_dist.core.errors import ConfigError
from qe_dist.data.options import ReadOptions
from qe_dist.data.sources import Fault, Note, Record
from qe_dist.data.text import parse, read_lines

OTHERS = (".parquet", ".arrow", ".zip", ".tar", ".gz", ".zst", ".tsv", ".csv", ".xlsx", ".pdf")
TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]')
OPENING, CLOSING = (b"[", b"{"), (b"]", b"}")


@dataclass(frozen=True)
class JsonFile:
    path: Path

    def records(self, note: Note) -> Iterator[Record | Fault]:
        rows = rows_of_array(self.path, read_lines(self.path)) if _is_array(self.path) else read_lines(self.path)
        for number, row in rows:
            if row.strip():
                yield self._record(number, row)

    def _record(self, number: int, row: bytes) -> Record | Fault:
        try:
            return Record(f"{self.path}:{number}", parse(row, self.path, number), self.path.parent)
        except ConfigError as error:
            return Fault(str(error))


def find(name: str, options: ReadOptions) -> JsonFile | None:
    """Any file but those that are tables or archives."""
    path = Path(name)
    return JsonFile(path) if path.is_file() and path.suffix.lower() not in OTHERS else None


def _is_array(path: Path) -> bool:
    """Whether a file is one array of records. A line may be a list, too: that of the messages of a conversation."""
    first = next((line.strip() for _, line in read_lines(path) if line.strip()), b"")
    if not first.startswith(b"["):
        return False
    try:
        value = json.loads(first)
    except ValueError:
        return True
    return bool(value) and not any(isinstance(one, dict) and {"role", "from"} & one.keys() for one in value)


def rows_of_array(path: Path, lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The elements of an array and the lines that they begin in, one in memory at a time. lines: of the file.

    An element ends where the brackets and braces that it opened are closed. ConfigError where the array does not end,
    or something stands behind its end.
    """
    element, depth, ended = _Element(), 0, False
    for number, line in lines:
        start = 0
        for token in () if ended else TOKENS.finditer(line):
            mark = token[0]
            depth += (mark in OPENING) - (mark in CLOSING)
            if depth == 1 and mark == b"[" and not element.has_text:
                start = token.end()
            if (depth == 1 and mark == b",") or (depth == 0 and mark in CLOSING):
                element.add(line[start : token.start()], number)
                if element.has_text:
                    yield element.begin, bytes(element.content)
                element, start, ended = _Element(), token.end(), depth == 0
            if ended:
                break
        element.add(line[start:] + b"\n", number)
        if ended and element.has_text:
            raise ConfigError(f"{path}:{number}: something stands behind the end of the array")
    if not ended:
        raise ConfigError(f"{path}: the array breaks off: it has no ']' at its end")


class _Element:
    """An element of an array, as far as it was read."""

    def __init__(self) -> None:
        self.content, self.begin = bytearray(), 0

    @property
    def has_text(self) -> bool:
        return bool(self.content.strip())

    def add(self, piece: bytes, number: int) -> None:
        """More of it, from this line."""
        if not self.has_text:
            self.content, self.begin = bytearray(), number
        self.content += piece
