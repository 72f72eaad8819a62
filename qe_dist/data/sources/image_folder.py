"""A folder of images, with captions in `.txt` files of the same names, or in `metadata.jsonl` or `metadata.csv`."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qe_dist.core.errors import ConfigError
from qe_dist.data.images import SUFFIXES
from qe_dist.data.options import ReadOptions
from qe_dist.data.sources import Fault, Note, Record
from qe_dist.data.sources.tables import SAVED
from qe_dist.data.text import parse, read_lines, text_of

METADATA = ("metadata.jsonl", "metadata.csv")
NAMES = ("file_name", "file_names")


@dataclass(frozen=True)
class ImageFolder:
    folder: Path

    def records(self, note: Note) -> Iterator[Record | Fault]:
        files = sorted(p for p in self.folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        tables = [path for path in files if path.name in METADATA]
        images = [path for path in files if path.suffix.lower() in SUFFIXES]
        if not images:
            raise ConfigError(f"{self.folder} has no image in it ({', '.join(SUFFIXES)})")
        if not tables and not any(path.with_suffix(".txt") in files for path in images):
            raise ConfigError(f"{self.folder} has images and no captions: NAME.txt beside NAME.png, or {METADATA[0]}")
        named: set[Path] = set()
        for table in tables:
            for row in _rows(table):
                yield row
                named |= _named(row)
        for image in images:
            if image.resolve() in named:
                continue
            caption = image.with_suffix(".txt")
            if caption.is_file():
                yield _captioned(image, caption)
            else:
                note("images without a caption, which are left out", str(image))


def find(name: str, options: ReadOptions) -> ImageFolder | None:
    """Any folder but those of `datasets`."""
    folder = Path(name)
    is_table = any((folder / marker).is_file() for marker in SAVED) or any(folder.glob("*.parquet"))
    return ImageFolder(folder) if folder.is_dir() and not is_table else None


def _captioned(image: Path, caption: Path) -> Record | Fault:
    try:
        text = "\n".join(text_of(line, caption, number) for number, line in read_lines(caption))
    except ConfigError as error:
        return Fault(str(error))
    return Record(str(caption), {"image": image.name, "caption": text.strip()}, image.parent)


def _rows(table: Path) -> Iterator[Record | Fault]:
    """A table's rows, with the image of each under its usual name."""
    for number, row in _lines_of_csv(table) if table.suffix == ".csv" else read_lines(table):
        origin = f"{table}:{number}"
        try:
            content = row if isinstance(row, dict) else parse(row, table, number) if row.strip() else None
            if content is None:
                continue
            key = next((name for name in NAMES if isinstance(content, dict) and name in content), None)
            if key is None:
                raise ConfigError(f"{origin}: has no {NAMES[0]!r}, which names the image")
            others = {name: value for name, value in content.items() if name != key}
            yield Record(origin, {"images": content[key], **others}, table.parent)
        except ConfigError as error:
            yield Fault(str(error))


def _lines_of_csv(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    text = "\n".join(text_of(line, table, number) for number, line in read_lines(table))
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise ConfigError(f"{table}:{rows.line_num}: has not as many cells as the first line")
            yield rows.line_num, row
    except csv.Error as error:
        raise ConfigError(f"{table}:{rows.line_num}: {error}") from None


def _named(row: Record | Fault) -> set[Path]:
    if isinstance(row, Fault):
        return set()
    said = row.content["images"]
    return {(row.folder / name).resolve() for name in (said if isinstance(said, list) else [said])}
