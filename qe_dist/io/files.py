"""The files of a model, on disk or in object storage. Of remote files only the requested bytes are transferred."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qe_dist.core.errors import CheckpointError
from qe_dist.io.bucket import Bucket, is_url
from qe_dist.io.shards import Span, Stored, unreadable

MIB = 2**20
ADVISED_BYTES = 128 * 1024
"""Linux limits each posix_fadvise to the read-ahead window of the device; this is its default size."""
AHEAD_BYTES = 2048 * MIB
"""Most bytes of a remote model that are read ahead and not yet requested: a block of 72B in bf16 has 1.7 GiB."""
REQUEST_BYTES, REQUESTS = 16 * MIB, 8
"""One connection to object storage is slow, so a long range is read by several parallel requests."""
KEPT_BYTES = 64 * 1024
"""Tensors up to this size, such as norms and biases, are requested more than once, so they are kept."""
SMALL_FILES = (".json", ".jinja", ".txt", ".model")


class Files(Protocol):
    """Reads the files of a model. Methods raise CheckpointError for what cannot be read."""

    folder: Path
    """The folder of the small files on this machine: config, tokenizer, processor."""

    def shown(self, name: str) -> str:
        """How a message names a file."""
        ...

    def names(self) -> Collection[str]:
        """The names of all files directly in the folder."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is no such file."""
        ...

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span."""
        ...

    def get(self, name: str, stored: Stored) -> Tensor:
        """The tensor of this name, which lies at `stored`."""
        ...

    def prefetch(self, spans: Iterable[Span]) -> None:
        """Begins to read these spans and returns at once."""
        ...


def open_files(model: Path | str) -> Files:
    """model: a directory, or a URL that fsspec opens."""
    return RemoteFiles(str(model)) if is_url(model) else LocalFiles(Path(model))


class LocalFiles:
    """A model directory on disk. Tensors are memory-mapped: the kernel may drop their pages and read them again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def shown(self, name: str) -> str:
        return str(self.folder / name)

    def names(self) -> Collection[str]:
        try:
            return {path.name for path in self.folder.iterdir() if not path.is_dir()}
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error.strerror}") from None

    def size(self, name: str) -> int | None:
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        return [self._read(span) for span in spans]

    def _read(self, span: Span) -> bytes:
        try:
            with (self.folder / span.file).open("rb") as file:
                file.seek(span.begin)
                return file.read(span.size)
        except OSError as error:
            raise unreadable(self.shown(span.file), error) from None

    def get(self, name: str, stored: Stored) -> Tensor:
        try:
            with safe_open(self.folder / stored.span.file, framework="pt") as shard:
                return shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise unreadable(self.shown(stored.span.file), error) from None

    def prefetch(self, spans: Iterable[Span]) -> None:
        """Asks the kernel to read ahead into the page cache, which the kernel frees when memory is needed."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        for span in spans:
            with contextlib.suppress(OSError), (self.folder / span.file).open("rb") as file:
                for begin in range(span.begin, span.end, ADVISED_BYTES):
                    length = min(ADVISED_BYTES, span.end - begin)
                    os.posix_fadvise(file.fileno(), begin, length, os.POSIX_FADV_WILLNEED)


class RemoteFiles:
    """A model directory at a URL. Tensors are read as ranges of their shards; no shard is copied as a whole."""

    def __init__(self, url: str) -> None:
        self._bucket = Bucket(url)
        listed = self._bucket.files()
        self._sizes = {name: about["size"] for name, about in listed.items()}
        self.folder = _fetch_small(self._bucket, listed)
        self._kept: dict[Span, Tensor] = {}
        self._queue: list[list[Span]] = []
        self._ahead: dict[Span, Future[dict[Span, Tensor]]] = {}
        self._reader = ThreadPoolExecutor(1, "read-ahead")

    def shown(self, name: str) -> str:
        return self._bucket.shown(name)

    def names(self) -> Collection[str]:
        return self._sizes.keys()

    def size(self, name: str) -> int | None:
        return self._sizes.get(name)

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        return self._bucket.read(spans)

    def get(self, name: str, stored: Stored) -> Tensor:
        span = stored.span
        content = self._kept[span].clone() if span in self._kept else self._take(span)
        if span.size <= KEPT_BYTES and span not in self._kept:
            self._kept[span] = content.clone()
        return content.view(stored.dtype).reshape(stored.shape)

    def _take(self, span: Span) -> Tensor:
        waiting = self._ahead.pop(span, None)
        if waiting is None:
            self._queue = [[s for s in group if s != span] for group in self._queue]
            return self._read([span])[span]
        content = waiting.result().pop(span)
        self._read_on()
        return content

    def prefetch(self, spans: Iterable[Span]) -> None:
        """Reads in a thread, at most AHEAD_BYTES ahead. Drops what an earlier call read and no `get` returned."""
        wanted = [span for span in dict.fromkeys(spans) if span not in self._kept]
        self._ahead = {span: self._ahead[span] for span in wanted if span in self._ahead}
        self._queue = list(_groups(span for span in wanted if span not in self._ahead))
        self._read_on()

    def _read_on(self) -> None:
        free = AHEAD_BYTES - sum(span.size for span in self._ahead)
        while self._queue and (size := sum(span.size for span in self._queue[0])) <= free:
            group, free = self._queue.pop(0), free - size
            self._ahead |= dict.fromkeys(group, self._reader.submit(self._read, group))

    def _read(self, spans: Sequence[Span]) -> dict[Span, Tensor]:
        """The bytes of each span. Adjacent spans are read as one."""
        contents = {span: np.empty(span.size, np.uint8) for span in spans}
        requests = list(_requests(spans))
        for i in range(0, len(requests), REQUESTS):
            some = requests[i : i + REQUESTS]
            for piece, found in zip(some, self._bucket.read(some), strict=True):
                for span, content in contents.items():
                    _copy_common(piece, np.frombuffer(found, np.uint8), span, content)
        return {span: torch.from_numpy(content) for span, content in contents.items()}


def _groups(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Groups of spans that are read at a time. A span that is larger than a group is a group of its own."""
    group: list[Span] = []
    for span in spans:
        if group and sum(s.size for s in group) + span.size > REQUESTS * REQUEST_BYTES:
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _requests(spans: Sequence[Span]) -> Iterator[Span]:
    """Covers the bytes of all spans by as few pieces of at most REQUEST_BYTES as possible."""
    runs: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.file, s.begin)):
        if runs and runs[-1].file == span.file and runs[-1].end == span.begin:
            runs[-1] = Span(span.file, runs[-1].begin, span.end)
        else:
            runs.append(span)
    for run in runs:
        for begin in range(run.begin, run.end, REQUEST_BYTES):
            yield Span(run.file, begin, min(begin + REQUEST_BYTES, run.end))


def _copy_common(piece: Span, found: np.ndarray, span: Span, content: np.ndarray) -> None:
    """Copies the bytes that a piece and a span of the same file share into the span's content."""
    begin, end = max(piece.begin, span.begin), min(piece.end, span.end)
    if piece.file == span.file and begin < end:
        content[begin - span.begin : end - span.begin] = found[begin - piece.begin : end - piece.begin]


def _fetch_small(bucket: Bucket, listed: Mapping[str, Mapping[str, Any]]) -> Path:
    """Copies config, tokenizer and processor into a folder, as transformers needs them, and returns the folder. A model
    that was changed at the same URL gets another folder."""
    small = {n: about for n, about in sorted(listed.items()) if Path(n).suffix in SMALL_FILES or n == "LICENSE"}
    state = hashlib.sha256(f"{bucket.url} {small!r}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qe_dist" / "models" / state
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            for name in small:
                bucket.fetch(name, place / name)
            with contextlib.suppress(OSError):  # another process was faster
                place.rename(folder)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    return folder
