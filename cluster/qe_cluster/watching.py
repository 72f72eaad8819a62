"""What the driver watches while it waits: the usage of its workers, the lock of its directory, the request to stop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from qe_cluster.heartbeats import BEAT_SECONDS, Usage
from qe_cluster.workers import WorkerPool
from qe_dist.core.errors import Stopped
from qe_dist.flow.local import RunLease

Listener = Callable[[str, dict[str, Any]], None]
"""Is called with the name and the data of each event (`qe_dist/flow/progress.py` lists them)."""


class Monitor:
    """Passes events on to `listen`, among them the usage of the workers, and says when to end."""

    def __init__(self, pool: WorkerPool, lease: RunLease, stop: threading.Event, listen: Listener) -> None:
        self.pool, self.lease, self.stop, self.listen = pool, lease, stop, listen

    @property
    def stopping(self) -> bool:
        """Whether the caller asked to stop. What is in flight is then finished, and nothing new begun."""
        return self.stop.is_set()

    def check_stop(self) -> None:
        """Raises Stopped when the caller asked to stop."""
        if self.stopping:
            raise Stopped("stopped as asked; what is done is published, type the same command again to continue")

    def wait(self, refs: Sequence[Any]) -> list[Any]:
        """Like `ray.get`, with heartbeats meanwhile. Raises RayError for a call whose worker is lost, and QEError when
        another command took the directory over."""
        return self.pool.heartbeats.wait(refs, self.lease.check)

    def check(self) -> None:
        """Asks for heartbeats, without waiting. Raises QEError when another command took the directory over."""
        self.lease.check()
        self.pool.heartbeats.beat()

    @asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """Asks for heartbeats in the background."""
        self.pool.heartbeats.idle = 0
        task = asyncio.create_task(self._keep_beating())
        try:
            yield
        finally:
            task.cancel()

    async def _keep_beating(self) -> None:
        while True:
            self.pool.heartbeats.beat()
            await asyncio.sleep(BEAT_SECONDS / 4)

    def report(self, actor: Any, usage: Usage) -> None:
        """Passes on what a worker said in a heartbeat; an embedder says nothing of interest."""
        number = self.pool.number(actor)
        if number is not None:
            self.listen("worker", self.pool.label(number) | dict(usage))
