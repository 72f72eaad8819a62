"""The activations between two waves, written and read by threads, so that no worker waits for the disk."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from qe_dist.core.batch import Batch
from qe_dist.io.run_dir import RunDir, SpoolKind

MAX_UNWRITTEN = 2  # batches that may wait to be written


@dataclass(frozen=True)
class Spooled:
    """A batch that lies on disk as it enters a block."""

    block: int
    index: int


class Spool:
    """One thread writes, one reads. The error of a failed write is raised by the next `put` or `flush`.

    A spool must be closed: when a failed run is continued in the same process, no thread may still write for it.
    """

    def __init__(self, store: RunDir, kind: SpoolKind = "activations") -> None:
        self.store, self.kind = store, kind
        self.writer, self.reader = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.written: list[Future[None]] = []
        self.ahead: dict[Spooled, Future[Batch]] = {}

    def put(self, block: int, batch: Batch) -> None:
        """Has a batch written as input of a block, unless it is on disk. Waits while MAX_UNWRITTEN are unwritten."""
        if self.store.has_batch(block, batch.index, self.kind):
            return
        self._wait(MAX_UNWRITTEN - 1)
        self.written.append(self.writer.submit(self.store.put_batch, block, batch, self.kind))

    def flush(self) -> None:
        """Returns when every batch is on disk."""
        self._wait(0)

    def _wait(self, left: int) -> None:
        """Waits until at most `left` writes are unfinished."""
        while len(self.written) > left:
            self.written.pop(0).result()

    def close(self) -> None:
        """Ends both threads. Reads and writes that have begun are finished, others are dropped."""
        for way in (self.writer, self.reader):
            way.shutdown(cancel_futures=True)

    def get(self, where: Spooled) -> Batch:
        """Returns a batch, and begins to read the next one."""
        found = self.ahead.pop(where, None) or self._read(where)
        following = Spooled(where.block, where.index + 1)
        is_there = self.store.has_batch(where.block, following.index, self.kind)
        self.ahead = {following: self._read(following)} if is_there else {}
        return found.result()

    def _read(self, where: Spooled) -> Future[Batch]:
        return self.reader.submit(self.store.get_batch, where.block, where.index, self.kind)
