"""A copy of a run's finished files in object storage, for machines whose disk does not last."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.io.bucket import Bucket
from qe_dist.io.publish import publish, read_json, sha256
from qe_dist.io.run_dir import RunDir, differences, without_writer
from qe_dist.io.shards import Span

MARKER = ".run/run.json"
REPORTS = ".run/blocks"
CONFIG = "config.json"

log = logging.getLogger("qe_dist")
Mark = tuple[int, int]
"""Time and size of a file; they change when it is written again."""


class Mirror:
    """Keeps a copy of a run directory at a URL, by a thread of its own.

    The copy has the directory's files under their names, except that finished tensors lie where `assemble` will move
    them, since nothing is renamed there. With config.json, which comes last, the copy is a checkpoint. A report is
    copied after its tensors, whose hash it has.
    """

    def __init__(self, url: str, store: RunDir) -> None:
        self._bucket, self._store = Bucket(url), store
        self._there: dict[str, Mark] = {}
        self._copier = ThreadPoolExecutor(1, "mirror")
        self._failure: Exception | None = None
        self._lock = Lock()

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Waits for the copies that have begun, after an error too, since they are finished work."""
        try:
            self.flush()
        except CheckpointError as failure:
            if error is None:
                raise
            log.error("%s", failure)
        finally:
            self._copier.shutdown()

    # -- from the URL to this machine

    def restore(self, identity: Mapping[str, Any], resume: str) -> None:
        """Fetches the files that are finished at the URL and not here. To be called before the run directory is opened.

        Raises ConfigError when the URL belongs to another run than the directory, or, for a new directory, to a run of
        another identity.
        """
        url, inside = self._bucket.url, self._bucket.files()
        listed = self._bucket.files(".run")
        if "run.json" not in listed:
            if inside:
                raise ConfigError(f"{url} is not empty and holds no run of ours; choose another --mirror")
            return
        if resume == "never":
            raise ConfigError(f"{url} holds a run already (resume=never)")
        marker = self._store.output / MARKER
        [content] = self._bucket.read([Span(MARKER, 0, listed["run.json"]["size"])])
        here = read_json(marker) if marker.exists() else json.loads(json.dumps(identity))
        there = _parsed(self._bucket.shown(MARKER), content)
        different = differences(without_writer(there), without_writer(here))
        if different:
            raise ConfigError(
                f"{url} belongs to another run, which differs in {'; '.join(different)}. Choose another --mirror, or "
                "the same settings to continue it"
            )
        self._publish(MARKER, marker, lambda path: path.write_bytes(content))
        if CONFIG in inside:
            self._there[CONFIG] = (0, 0)  # `sync` removes it there until it is written here
        reports = self._bucket.files(REPORTS)
        contents = self._bucket.read([Span(f"{REPORTS}/{n}", 0, about["size"]) for n, about in reports.items()])
        for report, content in zip(reports, contents, strict=True):
            try:
                self._restore_file(Path(report).stem, content)
            except CheckpointError as fault:
                log.warning("%s; it is made anew", fault)

    def _restore_file(self, name: str, content: bytes) -> None:
        report, file = f"{REPORTS}/{name}.json", f"{name}.safetensors"
        here = self._store.output / report
        if here.exists() and here.read_bytes() != content:
            return  # it was fitted again here, and `sync` copies it
        if not here.exists():
            digest = _parsed(self._bucket.shown(report), content).get("sha256")
            self._publish(file, self._store.finished / file, lambda path: self._fetch_sound(file, path, digest))
            self._publish(report, here, lambda path: path.write_bytes(content))
        elif self._store.place(name).exists():
            self._there |= {file: _mark(self._store.place(name)), report: _mark(here)}

    def _fetch_sound(self, name: str, path: Path, digest: str | None) -> None:
        self._bucket.fetch(name, path)
        found = sha256(path)
        if found != digest:
            raise CheckpointError(f"{self._bucket.shown(name)} is damaged: SHA-256 expected {digest}, found {found}")

    def _publish(self, name: str, path: Path, write: Callable[[Path], Any]) -> None:
        if not path.exists():
            publish(path, write)
        self._there[name] = _mark(path)

    # -- from this machine to the URL

    def sync(self) -> None:
        """Begins to copy the files that were published since the last call, and to remove those that are gone here.
        Waits only for run.json, which identifies the run. Raises CheckpointError when any copy so far failed."""
        self._check()
        with self._lock:
            found = dict(self._published())
            for name in sorted(self._there.keys() - found.keys(), key=lambda name: name != CONFIG):
                del self._there[name]
                self._copier.submit(self._try, self._bucket.remove, name)
            for name, path in found.items():
                mark = _mark(path)
                if self._there.get(name) != mark:
                    self._there[name] = mark
                    copied = self._copier.submit(self._try, self._bucket.put, path, name)
                    if name == MARKER:
                        copied.result()
        self._check()

    def flush(self) -> None:
        """Returns when every copy is finished. To be called before `assemble`, which moves files. Raises
        CheckpointError when a copy failed."""
        self._copier.submit(lambda: None).result()
        self._check()

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        """Runs an action, but none after a failure: a report must not be copied without its tensors."""
        if self._failure is None:
            try:
                action(*arguments)
            except Exception as error:
                self._failure = error

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _published(self) -> Iterator[tuple[str, Path]]:
        """Names at the URL and paths here of the published files, in the order in which they may be copied."""
        store = self._store
        yield MARKER, store.output / MARKER
        for report in sorted(store.finished.glob("*.json")):
            yield f"{report.stem}.safetensors", store.place(report.stem)
            yield f"{REPORTS}/{report.name}", report
        if store.is_complete:
            files = (p for p in store.output.iterdir() if p.is_file() and p.suffix != ".safetensors")
            for path in sorted(files, key=lambda p: p.name == CONFIG):
                yield path.name, path


def _parsed(shown: str, content: bytes) -> dict[str, Any]:
    try:
        return json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{shown} is damaged: {error}") from None


def _mark(path: Path) -> Mark:
    about = path.stat()
    return about.st_mtime_ns, about.st_size
