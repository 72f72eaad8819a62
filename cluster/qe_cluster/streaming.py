"""Batches pass through the stages of a wave, several at a time."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from qe_cluster.watching import Monitor
from qe_cluster.workers import WorkerPool, transfer_bytes
from qe_dist.data.samples import carried
from qe_dist.flow.local import Prepared
from qe_dist.flow.plan import Wave

IN_FLIGHT_PER_STAGE = 2


class Streamer:
    """Sends batches through the stages of a wave, so that each stage counts every batch into its statistics."""

    def __init__(self, ready: Prepared, pool: WorkerPool, monitor: Monitor) -> None:
        self.ready, self.pool, self.monitor = ready, pool, monitor
        self.tokens = 0
        """Tokens of all batches, once a wave was streamed from the first batch on."""

    def stream(self, number: int, wave: Wave, again: bool) -> None:
        """Sends every batch that a stage lacks, in order, and spools what enters the next wave.

        number: of the wave, for events. again: whether a worker was lost, so that a new one lacks what others have
        counted. Raises RayError when a worker is lost, and Stopped when the caller asked to stop.
        """
        ready, first, after = self.ready, wave[0].blocks[0].index, self.ready.block_after(wave)
        actors = [self.pool.workers[part.worker].actor for part in wave]
        begin, depth = self._lacking(actors, after)
        actors, after = actors[:depth], after if depth == len(wave) else None
        passes = [self.pool.forward(part.worker) for part in wave[: depth - 1]]
        if again and depth:
            self.monitor.listen("again", {"wave": number, "from_batch": begin})
        flight: deque[tuple[int, Any]] = deque()
        limit, tokens, room, embedder = IN_FLIGHT_PER_STAGE * depth, 0, transfer_bytes(), None
        for index in range(begin if depth else len(ready.samples), len(ready.samples)):
            while len(flight) >= limit:
                count, size = self._await_batch(number, flight)
                tokens += count
                limit = max(1, min(limit, room // size))
            if self.monitor.stopping:
                break
            batch = ready.entering(first, index)
            if batch is None:
                embedder = embedder or self.pool.embedder()
                batch = embedder.embed.remote(index, list(map(carried, ready.samples[index])))
            for forward in passes:
                batch = forward(batch)
            flight.append((index, actors[-1].finish.remote(batch, after)))
        while flight:
            tokens += self._await_batch(number, flight)[0]
        self.monitor.wait([writer.flush.remote() for writer in (embedder, *actors[-1:]) if writer is not None])
        self.monitor.check_stop()
        self.pool.dismiss_embedders()
        if begin == 0 and depth:
            self.tokens = tokens

    def _lacking(self, actors: Sequence[Any], after: int | None) -> tuple[int, int]:
        """The first batch that a stage or the spool lacks, and the number of stages that batches must pass through."""
        batches = range(len(self.ready.samples))
        counted = self.monitor.wait([actor.counted.remote() for actor in actors])
        lacking = {j: count for j, count in enumerate(counted) if count is not None and count < len(batches)}
        unspooled = [i for i in batches if after is not None and not self.ready.store.has_batch(after, i)]
        depth = len(actors) if unspooled else max(lacking, default=-1) + 1
        return min([*unspooled[:1], *lacking.values()], default=0), depth

    def _await_batch(self, number: int, flight: deque[tuple[int, Any]]) -> tuple[int, int]:
        """Waits until the oldest batch in flight has passed its last stage. Returns its tokens and bytes."""
        index, result = flight.popleft()
        [(tokens, size)] = self.monitor.wait([result])
        self.monitor.listen("batch", {"wave": number, "index": index, "tokens": tokens})
        self.monitor.check()
        return tokens, size
