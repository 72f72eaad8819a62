"""Samples are read several at once: in their order, no more than are wanted, and each as it would be alone."""

import base64
import json
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qe_dist import archs
from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import Example, Sample
from qe_dist.data import samples
from qe_dist.data.options import ReadOptions
from qe_dist.data.samples import load_images, read, survey
from qe_dist.data.scratch import Scratch
from qe_dist.data.sources import Note, Record
from tests.tiny import tiny_model

COUNT = 40


class Counting:
    """A source that knows how many of its records were taken."""

    taken = 0

    def records(self, note: Note) -> Iterator[Record]:
        for i in range(COUNT):
            self.taken += 1
            content: Any = {"text": f"text {i}"} if i % 10 != 7 else {"text": ""}
            yield Record(f"a:{i}", content, Path())


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setattr(samples, "THREADS", 8)
    monkeypatch.setattr(samples, "AHEAD", 16)
    made = Counting()
    monkeypatch.setattr(samples, "open_source", lambda name, options: made)
    return made


def slower_at_the_front(sample: Sample, images: Any) -> Example:
    """The first of each four ends last."""
    assert sample.text is not None
    time.sleep(0.02 if int(sample.text.split()[1]) % 4 == 0 else 0)
    ids = torch.arange(int(sample.text.split()[1]) + 1)
    return Example(0, "text", ids, ids, torch.zeros(len(ids), dtype=torch.int8), {})


def test_samples_come_in_the_order_of_their_source(source: Counting) -> None:
    found = survey("a", encode=slower_at_the_front)
    wanted = [i for i in range(COUNT) if i % 10 != 7]
    assert [s.text for s in found.samples] == [f"text {i}" for i in wanted]
    assert [s.index for s in found.samples] == list(range(len(wanted)))
    assert found.lengths == [i + 1 for i in wanted]
    assert [fault.split(":")[1] for fault in found.left_out] == ["7", "17", "27", "37"]


def test_no_more_records_are_taken_than_are_wanted(source: Counting) -> None:
    assert len(survey("a", ReadOptions(limit=7)).samples) == 7
    assert source.taken == 7
    source.taken = 0
    assert len(survey("a", ReadOptions(limit=8)).samples) == 8  # behind the bad one
    assert source.taken == 9


def test_the_first_fault_is_the_one_that_is_told(source: Counting) -> None:
    with pytest.raises(ConfigError, match=r"^a:7: "):
        read("a", encode=slower_at_the_front)
    assert source.taken < COUNT


def test_threads_change_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Typed special tokens, images in files and in addresses; the tokenizer and the scratch file are shared."""
    model = tiny_model(tmp_path / "model")
    encode = archs.for_checkpoint(json.loads((model / "config.json").read_text())).encoder(model)
    lines = []
    for i in range(48):
        Image.new("RGB", (28 + i, 40), (i, 5 * i, 255 - i)).save(tmp_path / f"{i}.png")
        said = f"{i} <|im_end|> typed <|im_start|> twice <|im_end|>" * 4 if i % 2 else f"number {i}"
        lines.append(json.dumps({"image": f"{i}.png", "question": said, "answer": "yes"}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-6)  # threads take turns so often that they would disturb each other

    def examples(threads: int) -> list[tuple[str, int, list[int]]]:
        monkeypatch.setattr(samples, "THREADS", threads)
        seen: list[tuple[str, list[int]]] = []

        def keep(sample: Sample, images: Any) -> Example:
            example = encode(sample, images)
            seen.append((sample.origin, example.input_ids.tolist()))
            return example

        found = read(tmp_path / "a.jsonl", encode=keep)
        ids = dict(seen)
        return [(s.digest, length, ids[s.origin]) for s, length in zip(found.samples, found.lengths, strict=True)]

    assert examples(8) == examples(1)


def test_the_scratch_file_is_shared_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "THREADS", 8)
    from qe_dist.data import scratch as module

    made = []

    class Slow(Scratch):
        def __init__(self) -> None:
            made.append(threading.get_ident())
            time.sleep(0.05)
            super().__init__()

    monkeypatch.setattr(module, "_made", module.cache(Slow))
    rows = []
    for i in range(16):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "x.png")
        content = base64.b64encode((tmp_path / "x.png").read_bytes()).decode()
        rows.append(json.dumps({"image": f"data:image/png;base64,{content}", "caption": f"shade {i}"}))
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = read(tmp_path / "a.jsonl").samples
    assert len(made) == 1
    assert [load_images(s)[0].getpixel((0, 0)) for s in found] == [(i, i, i) for i in range(16)]


def test_warnings_are_as_before_afterwards(source: Counting) -> None:
    before = list(warnings.filters)
    survey("a")
    assert list(warnings.filters) == before
