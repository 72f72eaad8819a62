"""What the driver watches while it waits: the usage of its workers, the lock of its directory, the request to stop."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from qe_cluster.workers import WorkerPool
from qe_dist.core.errors import Stopped
from qe_dist.flow.local import RunLease

USAGE_PERIOD_SECONDS = 2.0  # between two requests for the usage of all workers
Listener = Callable[[str, dict[str, Any]], None]
"""Is called with the name and the data of each event (`qe_dist/flow/progress.py` lists them)."""


class Monitor:
    """Passes events on to `listen`, among them the usage of the workers, and says when to end."""

    def __init__(self, pool: WorkerPool, lease: RunLease, stop: threading.Event, listen: Listener) -> None:
        self.pool, self.lease, self.stop, self.listen = pool, lease, stop, listen
        self.requests: dict[Any, int] = {}
        """Requests for usage that have no answer yet, each with the number of its worker."""
        self.last_request = time.monotonic()

    @property
    def stopping(self) -> bool:
        """Whether the caller asked to stop. What is in flight is then finished, and nothing new begun."""
        return self.stop.is_set()

    def check_stop(self) -> None:
        """Raises Stopped when the caller asked to stop."""
        if self.stopping:
            raise Stopped("stopped as asked; what is done is published, type the same command again to continue")

    def check(self) -> None:
        """Reports the usage of workers, without waiting. Raises QEError when another command took the directory
        over."""
        self.lease.check()
        self._report_usage()

    @asynccontextmanager
    async def reporting(self) -> AsyncIterator[None]:
        """Reports the usage of workers in the background."""
        task = asyncio.create_task(self._keep_reporting())
        try:
            yield
        finally:
            task.cancel()

    async def _keep_reporting(self) -> None:
        while True:
            self._report_usage()
            await asyncio.sleep(USAGE_PERIOD_SECONDS / 4)

    def _report_usage(self) -> None:
        refs = list(self.requests)
        answered, _ = ray.wait(refs, num_returns=len(refs), timeout=0) if refs else ([], [])
        for ref in answered:
            number = self.requests.pop(ref)
            try:
                self.listen("worker", self.pool.label(number) | ray.get(ref))
            except (RayError, IndexError):
                continue  # the worker is lost; the calls that wait for its work raise that
        if time.monotonic() - self.last_request > USAGE_PERIOD_SECONDS:
            self.last_request = time.monotonic()
            self.requests = {w.actor.usage.remote(): i for i, w in enumerate(self.pool.workers)}
