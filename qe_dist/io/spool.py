"""The activations between two waves: written behind and read ahead, so that nobody waits for the disk."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from qe_dist.core.batch import Batch
from qe_dist.io.run_dir import RunDir

BEHIND = 2  # batches that may wait to be written


@dataclass(frozen=True)
class Spooled:
    """A batch that lies on disk as it enters a block."""

    block: int
    index: int


class Spool:
    """One thread each way. A write that failed is raised by the next `put` or `flush`.

    To be closed: who continues a run that failed must not meet a thread of it that still writes.
    """

    def __init__(self, store: RunDir) -> None:
        self.store = store
        self.writer, self.reader = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.written: list[Future[None]] = []
        self.ahead: dict[Spooled, Future[Batch]] = {}

    def put(self, block: int, batch: Batch) -> None:
        """Soon on disk; at once if it is there already."""
        if self.store.has_batch(block, batch.index):
            return
        self._wait(BEHIND - 1)
        self.written.append(self.writer.submit(self.store.put_batch, block, batch))

    def flush(self) -> None:
        """Returns when everything is on disk."""
        self._wait(0)

    def _wait(self, left: int) -> None:
        """For all writes but so many."""
        while len(self.written) > left:
            self.written.pop(0).result()

    def close(self) -> None:
        """Ends both threads: what has begun is done, what has not is forgotten."""
        for way in (self.writer, self.reader):
            way.shutdown(cancel_futures=True)

    def get(self, where: Spooled) -> Batch:
        """A batch; the next one is being read when this returns."""
        found = self.ahead.pop(where, None) or self._read(where)
        following = Spooled(where.block, where.index + 1)
        self.ahead = {following: self._read(following)} if self.store.has_batch(where.block, following.index) else {}
        return found.result()

    def _read(self, where: Spooled) -> Future[Batch]:
        return self.reader.submit(self.store.get_batch, where.block, where.index)
