"""A folder in object storage. Errors name the URL and say what to do; requests that fail are tried again."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.io.shards import Span

T = TypeVar("T")
PAUSES = (1.0, 4.0)
"""Seconds before a request is tried again. The clients of s3 and gs also retry within each try."""


def is_url(place: object) -> bool:
    """Whether a path is a URL."""
    return "://" in str(place)


class Bucket:
    """A folder at a URL that fsspec opens, such as s3://bucket/folder. Every method raises CheckpointError when the
    storage cannot be reached."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.url_to_fs(self.url)
        except ImportError as error:
            raise ConfigError(
                f"{url} cannot be reached: {error}; for s3:// that is pip install 'qe_dist[s3]'"
            ) from None
        except ValueError as error:
            raise ConfigError(f"{url} is no address of a storage: {error}") from None
        if isinstance(self._fs, LocalFileSystem):
            self._fs.auto_mkdir = True  # object storage knows no folders

    def shown(self, name: str) -> str:
        """How a message names a file."""
        return f"{self.url}/{name}"

    def files(self, folder: str = "") -> dict[str, dict]:
        """The files directly in a folder, by name, each with its properties, such as "size". Empty for no folder."""
        place = self._path(folder).rstrip("/")

        def call() -> list[dict]:
            self._fs.invalidate_cache()
            return self._fs.ls(place, detail=True)

        try:
            found = self._attempt(self.shown(folder), call)
        except FileNotFoundError:
            return {}
        return {f["name"].rpartition("/")[2]: f for f in found if f["type"] == "file"}

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span. Every span is one request, and the requests of a call run in parallel.

        Raises CheckpointError for a file that is missing or shorter than expected.
        """
        if not spans:
            return []
        paths = [self._path(span.file) for span in spans]
        begins, ends = [span.begin for span in spans], [span.end for span in spans]
        shown = self.shown(spans[0].file)
        try:
            found = self._attempt(shown, lambda: self._fs.cat_ranges(paths, begins, ends, on_error="raise"))
        except FileNotFoundError:
            raise CheckpointError(f"{shown} is missing") from None
        for span, content in zip(spans, found, strict=True):
            if len(content) != span.size:
                raise CheckpointError(
                    f"{self.shown(span.file)} ended early: {len(content)} of {span.size} bytes from {span.begin} on; "
                    "it is truncated or was overwritten meanwhile, copy it again"
                )
        return found

    def fetch(self, name: str, path: Path) -> None:
        """Copies a file to a path on this machine, not atomically (see `publish`). Raises CheckpointError when the file
        is missing."""
        try:
            self._attempt(self.shown(name), lambda: self._fs.get_file(self._path(name), str(path)))
        except FileNotFoundError:
            raise CheckpointError(f"{self.shown(name)} is missing") from None

    def put(self, path: Path, name: str) -> None:
        """Copies a file to the storage."""
        try:
            self._attempt(self.shown(name), lambda: self._fs.put_file(str(path), self._path(name)))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.shown(name)} could not be written: {error}; is there such a bucket?"
            ) from None

    def remove(self, name: str) -> None:
        """Removes a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._attempt(self.shown(name), lambda: self._fs.rm_file(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _attempt(self, shown: str, call: Callable[[], T]) -> T:
        """Calls up to three times. Raises FileNotFoundError at once, and CheckpointError for everything else, since
        each kind of storage has exceptions of its own."""
        for pause in (*PAUSES, None):
            try:
                return call()
            except FileNotFoundError:
                raise
            except Exception as error:
                if isinstance(error, PermissionError) or pause is None:
                    said = str(error) or type(error).__name__
                    raise CheckpointError(
                        f"{shown} cannot be reached: {said}; check the address, the network and the credentials of "
                        "this machine and its workers. Nothing finished is lost"
                    ) from error
                time.sleep(pause)
        raise AssertionError("unreachable")
