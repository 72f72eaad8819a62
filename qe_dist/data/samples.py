"""Reads samples of any source: understood, images decoded once, and encoded for a model, so that every fault is found
before the work begins."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from qe_dist.core.batch import IMAGE
from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import Example, ImageRef, Sample
from qe_dist.data.images import decode
from qe_dist.data.options import PLAIN, ReadOptions
from qe_dist.data.places import Finder
from qe_dist.data.scratch import scratch
from qe_dist.data.shapes import check_columns, renamed, understand
from qe_dist.data.sources import Fault, Record, open_source

Encode = Callable[[Sample, Sequence[Image.Image]], Example]
SHOWN = 3
"""Samples that a line names; it counts the others."""
CUT = "samples longer than the model's context, which are cut at their end"
UNUSED = "keys that are not used"


@dataclass
class Notes:
    """What is to be said of samples that are read all the same."""

    places: dict[str, list[str]] = field(default_factory=dict)
    keys: Counter[str] = field(default_factory=Counter)
    """Keys of records that are not used."""

    def add(self, what: str, where: str) -> None:
        self.places.setdefault(what, []).append(where)

    def unused(self, key: str) -> None:
        self.keys[key] += 1

    def lines(self) -> list[str]:
        """One for each thing that is to be said."""
        lines = []
        for what, places in self.places.items():
            more = f", and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
            lines.append(f"{what}: {', '.join(places[:SHOWN])}{more}")
        if self.keys:
            lines.append(f"{UNUSED}: {', '.join(f'{key} ({count})' for key, count in sorted(self.keys.items()))}")
        return lines


@dataclass(frozen=True)
class Reading:
    """The samples of a source."""

    samples: list[Sample]
    lengths: list[int]
    """Tokens of each; none where they were read for no model."""
    vision: list[int]
    """Those of them that are of images."""
    notes: list[str]
    """What is to be said of them, a line each."""
    left_out: list[str]
    """Samples that are left out, each with the reason."""

    @property
    def fingerprint(self) -> str:
        """A hash of what is said and of all pixels: the same for the same samples from sources of different forms."""
        return hashlib.sha256("".join(sample.digest for sample in self.samples).encode()).hexdigest()[:16]


def read(source: Path | str, options: ReadOptions = PLAIN, encode: Encode | None = None) -> Reading:
    """Reads the samples of a source (`data/sources/`). Keeps no pixel.

    encode: of the model that they are for. Raises ConfigError, which names file and line, for the first sample that is
    faulty; where a share of them may be left out, for more of them than that.
    """
    found = survey(source, options, encode, stop=not options.skip_bad)
    bad, count = len(found.left_out), len(found.left_out) + len(found.samples)
    if bad > options.skip_bad * count:
        raise ConfigError(
            f"{source}: {bad} of {count} samples are bad, more than {options.skip_bad:.3%}: "
            + "; ".join(found.left_out[:SHOWN])
            + ("; ..." if bad > SHOWN else "")
        )
    if not found.samples:
        raise ConfigError(f"{source} has no usable sample; expected at least one")
    return found


def survey(
    source: Path | str, options: ReadOptions = PLAIN, encode: Encode | None = None, stop: bool = False
) -> Reading:
    """The same, with all faulty samples left out. stop: raises ConfigError for the first of them."""
    check_columns(options.columns)
    reader = _Reader(options, encode)
    for record in open_source(str(source), options).records(reader.notes.add):
        try:
            reader.take(record)
        except ConfigError as error:
            if stop:
                raise
            reader.left_out.append(str(error))
        if options.limit is not None and len(reader.samples) >= options.limit:
            break
    notes = [f"{source}: {line}" for line in reader.notes.lines()]
    notes += [f"left out: {fault}" for fault in reader.left_out]
    return Reading(reader.samples, reader.lengths, reader.vision, notes, reader.left_out)


def read_samples(source: Path | str, options: ReadOptions = PLAIN) -> list[Sample]:
    """All samples of a source, for no model."""
    return read(source, options).samples


class _Reader:
    def __init__(self, options: ReadOptions, encode: Encode | None) -> None:
        self.options, self.encode, self.notes, self.finder = options, encode, Notes(), Finder(options)
        self.samples: list[Sample] = []
        self.lengths: list[int] = []
        self.vision: list[int] = []
        self.left_out: list[str] = []

    def take(self, record: Record | Fault) -> None:
        """Adds a sample. ConfigError where something is wrong with it."""
        if isinstance(record, Fault):
            raise ConfigError(record.message)
        keys: list[str] = []
        said = understand(renamed(record.content, self.options.columns), record.origin, keys.append)
        refs = [self.finder.find(image, record.origin, record.folder, bounds) for image, bounds in said.images]
        notes: list[tuple[str, str]] = []
        pictures = [
            decode(bytes_of(ref), f"{record.origin}: {ref.name}", partial(_noted, notes, ref.name)) for ref in refs
        ]
        images = tuple(replace(ref, size=picture.size) for ref, picture in zip(refs, pictures, strict=True))
        digest = _digest(said.text, said.messages, images, pictures)
        sample = Sample(len(self.samples), record.origin, said.kind, said.messages, said.text, images, digest)
        if self.encode is not None:
            example = self.encode(sample, pictures)
            self.lengths.append(example.input_ids.numel())
            self.vision.append(int((example.modality == IMAGE).sum()))
            if example.cut:
                notes.append((CUT, f"{sample.origin} ({example.cut} of {self.lengths[-1] + example.cut} tokens)"))
        self.samples.append(sample)
        for key in keys:
            self.notes.unused(key)
        for what, where in notes:
            self.notes.add(what, where)


def _noted(notes: list[tuple[str, str]], where: str, what: str) -> None:
    notes.append((what, where))


def _digest(text: str | None, messages: Any, images: Sequence[ImageRef], pictures: Sequence[Image.Image]) -> str:
    shown = [
        [picture.size, hashlib.sha256(picture.tobytes()).hexdigest(), ref.bounds.least, ref.bounds.most]
        for ref, picture in zip(images, pictures, strict=True)
    ]
    return hashlib.sha256(json.dumps([text, messages, shown], sort_keys=True).encode()).hexdigest()


def bytes_of(image: ImageRef) -> Path | bytes:
    """The encoded bytes of an image, or the file that has them."""
    if image.content is not None:
        return image.content
    return image.path or scratch().get(image.begin, image.length)


def load_images(sample: Sample) -> list[Image.Image]:
    """The decoded images of a sample, RGB."""
    return [decode(bytes_of(image), f"{sample.origin}: {image.name}") for image in sample.images]


def carried(sample: Sample) -> Sample:
    """The sample as it goes to another process: with the bytes of images that are no files of their own."""
    images = tuple(
        image if image.path is not None else replace(image, content=scratch().get(image.begin, image.length))
        for image in sample.images
    )
    return replace(sample, images=images)
