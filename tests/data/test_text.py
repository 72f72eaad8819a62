"""JSON is read strictly, and faults are named by line and byte."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qe_dist.core.errors import ConfigError
from qe_dist.data.samples import read, read_samples
from qe_dist.data.text import parse, read_lines

ROWS = [{"text": "naïve café — 图像 👩‍👩‍👧"}, {"prompt": "Describe 🟡 مرحبا", "answer": "yellow ring é"}]
WHOLE = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
ASCII = "\n".join(json.dumps(row) for row in ROWS)

FORMS = {
    "utf-8": WHOLE.encode(),
    "byte order mark": b"\xef\xbb\xbf" + WHOLE.encode(),
    "CR LF": WHOLE.replace("\n", "\r\n").encode(),
    "CR": WHOLE.replace("\n", "\r").encode(),
    "escapes": ASCII.encode(),
    "blank lines": b"\n\n  \n" + WHOLE.encode() + b"\n",
    "array": json.dumps(ROWS).encode(),
    "array over lines": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "array, a record a line": ("[" + ",\n".join(map(json.dumps, ROWS)) + "]").encode(),
    "array with a mark": b"\xef\xbb\xbf  " + json.dumps(ROWS).encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_samples_in_every_form(form: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(FORMS[form])
    (tmp_path / "plain.jsonl").write_bytes(WHOLE.encode())
    assert read(path).fingerprint == read(tmp_path / "plain.jsonl").fingerprint
    assert [s.text for s in read_samples(path)] == [ROWS[0]["text"], None]


def test_other_line_separators_of_unicode_end_no_line(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0b\x0c\x1c"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    assert [s.text for s in read_samples(tmp_path / "a.jsonl")] == [text]


GOOD = b'{"text": "good"}\n'
FAULTS = {
    "Latin-1": ('{"text": "Ein Stück"}'.encode("latin-1"), r":2: byte 17 \(0xFC\) is not UTF-8.*iconv"),
    "cut character": ('{"text": "图"}'.encode()[:-3] + b'"}', r":2: byte 11 \(0xE5\) is not UTF-8"),
    "lone high half": (rb'{"text": "broken \ud83d emoji"}', r":2: byte 18: \\ud83d is half of a character"),
    "lone low half": (rb'{"text": "\\ \ude00"}', r":2: byte 14: \\ude00 is half"),
    "two high halves": (rb'{"text": "\ud83d\ud83d\ude00"}', r":2: byte 11: \\ud83d is half"),
    "NUL": (rb'{"text": "a\u0000b"}', r":2: byte 12: \\u0000 \(NUL\)"),
    "raw NUL": (b'{"text": "a\0b"}', r":2: broken JSON \(Invalid control character at, byte 12"),
    "a key twice": (b'{"text": "a", "text": "b"}', r":2: broken JSON \(the key 'text' is there twice"),
    "NaN": (b'{"text": "a", "score": NaN}', r":2: broken JSON \(NaN is no number"),
    "cut line": (b'{"text": "a', r":2: broken JSON \(Unterminated string starting at, byte 10"),
    "deep": (b'{"text": ' + b"[" * 100_000, r":2.*(too deep|broken JSON)"),
    "long number": (b'{"text": ' + b"9" * 5000 + b"}", r":2: broken JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_by_line_and_byte(name: str, tmp_path: Path) -> None:
    line, says = FAULTS[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(ConfigError, match=r"a\.jsonl" + says):
        read_samples(path)


def test_escapes_that_are_no_characters_of_their_own_are_text(tmp_path: Path) -> None:
    """A backslash and what follows it, and both halves of a character."""
    text = "\\u0000 \\ud83d 😀"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert read_samples(tmp_path / "a.jsonl")[0].text == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "a.jsonl").write_bytes((mark + WHOLE).encode(encoding))
    with pytest.raises(ConfigError, match=rf"a\.jsonl:1: byte 1: the file is UTF-{encoding[4:6]}; save it as UTF-8"):
        read_samples(tmp_path / "a.jsonl")


def test_faults_in_an_array_are_named_by_their_own_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "a"},\n {"text": "b",\n  "kind": nonsense}\n]')
    with pytest.raises(ConfigError, match=r"a\.json:4: broken JSON \(Expecting value, byte 11"):
        read_samples(path)
    path.write_text('[{"text": "a"},\n{"text": "b"}')
    with pytest.raises(ConfigError, match="the array breaks off"):
        read_samples(path)
    path.write_text('[{"text": "a"}]\n{"text": "b"}')
    with pytest.raises(ConfigError, match=r"a\.json:2: something stands behind the end"):
        read_samples(path)
    path.write_text('[{"text": "],[ \\" {"}, {"text": "b"}]')
    assert [s.text for s in read_samples(path)] == ['],[ " {', "b"]


CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(CHARACTERS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(CHARACTERS, max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.sampled_from("abc"), VALUES), max_size=4),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
)
def test_arrays_are_cut_where_json_cuts_them(
    rows: list[dict[str, object]], indent: int | str | None, ascii: bool
) -> None:
    from qe_dist.data.sources.json_lines import rows_of_array

    text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    lines = list(enumerate(text.encode().splitlines(), start=1))
    found = [parse(row, Path("a"), number) for number, row in rows_of_array(Path("a"), lines)]
    assert found == rows


@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_one_error(content: bytes) -> None:
    with contextlib.suppress(ConfigError):
        parse(content, Path("a"), 1)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gone cannot be read: No such file"):
        list(read_lines(tmp_path / "gone"))
