"""Reads JSON strictly: UTF-8, no lone surrogate, no NUL, no key twice. Every fault is named by its byte."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from qe_dist.core.errors import ConfigError

MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
ESCAPES = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
HIGH, LOW = (0xD800, 0xDC00), (0xDC00, 0xE000)
"""Codes of the halves of characters beyond 16 bits."""


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line of a file, without its end (LF, CR LF or CR) and without a mark of UTF-8 at the
    begin. ConfigError for a file in UTF-16 or UTF-32, or one that cannot be read."""
    number = 0
    try:
        with path.open("rb") as file:
            for part in file:
                if number == 0:
                    part = _without_mark(part, path)
                for line in part.splitlines() or [b""]:
                    number += 1
                    yield number, line
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _without_mark(first: bytes, path: Path) -> bytes:
    for mark, name in MARKS.items():
        if first.startswith(mark):
            raise ConfigError(f"{path}:1: byte 1: the file is {name}; save it as UTF-8")
    return first.removeprefix(codecs.BOM_UTF8)


def text_of(line: bytes, path: Path, number: int) -> str:
    """The bytes as UTF-8. ConfigError names the first byte that is none. number: of the line in the file."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{_place(line, path, number, error.start)} (0x{line[error.start]:02X}) is not UTF-8; save the file as "
            "UTF-8 (iconv -f latin1 -t utf-8, if it is Latin-1)"
        ) from None


def _place(line: bytes, path: Path, number: int, position: int) -> str:
    """Where a byte of a record is; the record may go over several lines."""
    *before, last = line[:position].split(b"\n")
    return f"{path}:{number + len(before)}: byte {len(last) + 1}"


def parse(line: bytes, path: Path, number: int) -> Any:
    """The JSON value of a record that begins in this line. ConfigError, which names file, line and byte, for what is
    none, or says a thing twice or in characters that no text has."""
    text = text_of(line, path, number)
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ConfigError(f"{path}:{number}: lists and objects within each other, too deep to read") from None
    except json.JSONDecodeError as error:
        place = _place(line, path, number, len(text[: error.pos].encode()))
        origin, _, byte = place.rpartition(": ")
        raise ConfigError(f"{origin}: broken JSON ({error.msg}, {byte}); expected one object per line") from None
    except ValueError as error:
        raise ConfigError(f"{path}:{number}: broken JSON ({error})") from None
    if b"\\u" in line:
        for position, fault in _bad_escapes(line):
            raise ConfigError(f"{_place(line, path, number, position)}: {fault}; remove it")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _bad_escapes(line: bytes) -> Iterator[tuple[int, str]]:
    """Position and fault of each escape of NUL, or of half of a character beyond 16 bits that stands alone."""
    high: re.Match[bytes] | None = None
    for escape in ESCAPES.finditer(line):
        code = int(escape[1], 16) if escape[1] else -1
        paired = high is not None and LOW[0] <= code < LOW[1] and escape.start() == high.end()
        alone = None if paired else high or (escape if LOW[0] <= code < LOW[1] else None)
        if alone is not None:
            yield alone.start(), f"{alone[0].decode()} is half of a character (a lone surrogate)"
        if code == 0:
            yield escape.start(), "\\u0000 (NUL) in a text"
        high = escape if HIGH[0] <= code < HIGH[1] else None
    if high is not None:
        yield high.start(), f"{high[0].decode()} is half of a character (a lone surrogate)"


def check_text(text: str, origin: str) -> str:
    """The text. ConfigError where it has NUL or a lone surrogate, which JSON is searched for before it is parsed."""
    if found := re.search("[\0\ud800-\udfff]", text):
        byte = len(text[: found.start()].encode("utf-8")) + 1
        raise ConfigError(f"{origin}: U+{ord(found[0]):04X} at byte {byte} of a text; remove it")
    return text
