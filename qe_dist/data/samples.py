"""Reads samples of any source: understood, images decoded once, and encoded for a model, so that every fault is found
before the work begins."""

import hashlib
import json
import os
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
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
THREADS = min(8, len(os.sched_getaffinity(0)))
"""Samples that are decoded and encoded at once; libraries of images and tokens let go of Python's lock meanwhile."""
AHEAD = 2 * THREADS
"""Records that are read ahead."""
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

    def of(self, found: "_Read") -> None:
        """What is to be said of a sample."""
        self.keys.update(found.keys)
        for what, where in found.notes:
            self.add(what, where)

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
    reader, notes = _Reader(options, encode), Notes()
    samples: list[Sample] = []
    lengths: list[int] = []
    vision: list[int] = []
    left_out: list[str] = []
    most = sys.maxsize if options.limit is None else options.limit
    records = iter(open_source(str(source), options).records(notes.add))
    # `decode` turns warnings off for itself, which threads would turn on again for each other.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(THREADS) as pool:
        for future in _ahead(pool, reader.read, records, lambda: most - len(samples)):
            try:
                found = future.result()
            except ConfigError as error:
                if stop:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                left_out.append(str(error))
                continue
            samples.append(replace(found.sample, index=len(samples)))
            lengths += [] if encode is None else [found.length]
            vision += [] if encode is None else [found.vision]
            notes.of(found)
    lines = [f"{source}: {line}" for line in notes.lines()]
    lines += [f"left out: {fault}" for fault in left_out]
    return Reading(samples, lengths, vision, lines, left_out)


def _ahead(
    pool: Executor,
    work: "Callable[[Record | Fault], _Read]",
    records: Iterator[Record | Fault],
    wanted: Callable[[], int],
) -> "Iterator[Future[_Read]]":
    """What becomes of the records, in their order; no more of them are begun than are still wanted."""
    waiting: deque[Future[_Read]] = deque()
    while True:
        room = min(AHEAD, wanted()) - len(waiting)
        waiting.extend(pool.submit(work, record) for record in islice(records, room))
        if not waiting:
            return
        yield waiting.popleft()


def read_samples(source: Path | str, options: ReadOptions = PLAIN) -> list[Sample]:
    """All samples of a source, for no model."""
    return read(source, options).samples


@dataclass(frozen=True)
class _Read:
    """A sample, and what is to be said of it."""

    sample: Sample
    """Its index is not known yet."""
    length: int
    vision: int
    keys: list[str]
    """Keys of the record that are not used."""
    notes: list[tuple[str, str]]


class _Reader:
    """Reads records, several at once in as many threads."""

    def __init__(self, options: ReadOptions, encode: Encode | None) -> None:
        self.options, self.encode, self.finder = options, encode, Finder(options)

    def read(self, record: Record | Fault) -> _Read:
        """ConfigError where something is wrong with it."""
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
        sample = Sample(0, record.origin, said.kind, said.messages, said.text, images, digest)
        if self.encode is None:
            return _Read(sample, 0, 0, keys, notes)
        example = self.encode(sample, pictures)
        length, vision = example.input_ids.numel(), int((example.modality == IMAGE).sum())
        if example.cut:
            notes.append((CUT, f"{sample.origin} ({example.cut} of {length + example.cut} tokens)"))
        return _Read(sample, length, vision, keys, notes)


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
