"""The pipeline of `qe_dist/flow/local.py` on a Ray cluster: the same calls on references, the same bytes.

`quantize` plans wave after wave. In each, batches stream through a chain of stage actors (`streaming.py`): stage k
takes batch i + 1 while stage k + 1 takes batch i. Then the blocks are fitted in parallel (`fitting.py`). Weights and
statistics stay on their worker, except for groups that a worker with nothing left to do fits for another one. An actor
runs its calls in the order in which they were made, so its fits see all its batches.

When a worker is lost, another one loads its blocks and the wave is streamed again: a stage that has counted a batch
only forwards it, and a finished block stays finished.
"""

import asyncio
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from qe_cluster.fitting import Fitter
from qe_cluster.launch import cluster_address, ray_cluster
from qe_cluster.metrics import Metrics
from qe_cluster.streaming import Streamer
from qe_cluster.watching import Listener, Monitor
from qe_cluster.workers import WorkerPool, loss_reason, out_of_memory
from qe_dist import __version__
from qe_dist.core.errors import TemporaryError
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import Prepared, finish, opened, prepare_run, start
from qe_dist.flow.plan import Wave, local_capacities, plan_wave
from qe_dist.io.checkpoint import read_manifest
from qe_dist.io.journal import JOURNAL, Journal

MAX_LOSSES = 5  # in a row without a block finished; more are no accident
MAX_KILLED = 1  # of them since memory ran out, which the same blocks would do again


@dataclass
class Summary:
    """What a call of `quantize` did."""

    seconds: float
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Usage of each worker at the end (`Stage.usage`)."""
    tokens: int = 0
    fallbacks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Steps of the ladder by layer, of the first run."""
    continued: int = 0
    """Blocks that an earlier call had finished."""


def quantize(
    *runs: RunConfig,
    address: str | None = None,
    listen: Listener = lambda *_: None,
    stop: threading.Event | None = None,
    worker_timeout: float = 60.0,
) -> Summary:
    """Quantizes on a Ray cluster, and continues where an earlier call ended (see `flow.local.quantize`).

    address: of a running cluster; None: that of RAY_ADDRESS, else one that is started here. listen: is called with
    every event. stop: when it is set, the batches and blocks in flight are finished and Stopped is raised.
    worker_timeout: seconds to wait for the workers that were asked for; a cluster that grows on demand needs minutes.

    Raises QEError, whose message says what to do; finished blocks are kept. It is a TemporaryError when workers were
    lost.
    """
    begin, address = time.perf_counter(), cluster_address(address)
    ready = prepare_run(*runs, capacities=local_capacities(runs[0]) if address is None else ())
    with opened(ready) as (ready, lease), _journaled(listen, ready) as listen:
        for text in ready.notes:
            listen("note", {"text": text})
        summary = Summary(0.0, continued=_num_finished(ready))
        with ThreadPoolExecutor(1) as thread:
            passed_through = thread.submit(start, ready)
            if ready.next_block() is not None:
                with ray_cluster(address, (runs[0].workers or 1) * runs[0].threads), Metrics() as metrics:
                    pool = WorkerPool(ready.task, worker_timeout)
                    monitor = Monitor(pool, lease, stop or threading.Event(), _all_of(listen, metrics))
                    _Waves(ready, pool, monitor).run(summary)
            passed_through.result()
        finish(ready, lease)
        summary.fallbacks = read_manifest(runs[0].output).fallbacks
        summary.seconds = time.perf_counter() - begin
        listen("done", {"seconds": summary.seconds})
    return summary


class _Waves:
    """The waves of one call, each from its plan to its last finished block."""

    def __init__(self, ready: Prepared, pool: WorkerPool, monitor: Monitor) -> None:
        self.ready, self.pool, self.listen = ready, pool, monitor.listen
        pool.heartbeats.listen = monitor.report
        self.streamer, self.fitter = Streamer(ready, pool, monitor), Fitter(ready, pool, monitor)
        self.number = 0
        """Number of the current wave, from 1 on."""
        self.losses, self.killed, self.done = 0, 0, 0
        """Losses since the last block was finished, those for want of memory, and the blocks that were finished."""

    def run(self, summary: Summary) -> None:
        """Runs waves until every block is finished, and completes the summary. Raises TemporaryError for a loss that
        nothing here replaces."""
        ready = self.ready
        counts = {"batches": len(ready.samples), "blocks": len(ready.model.blocks), "done": summary.continued}
        counts["in_order"] = any(run.recipe.tuning is not None for run in ready.configs)
        process = {"host": platform.node(), "pid": os.getpid(), "version": __version__}
        self.listen("start", counts | process | {"first": ready.next_block(), "workers": ready.config.workers})
        try:
            while (first := ready.next_block()) is not None:
                self._run_wave(self._plan_wave(first))
                ready.store.drop_batches_before(first)
            summary.tokens, summary.stages = self.streamer.tokens, self.pool.usage()
        except RayError as error:
            raise TemporaryError(
                f"{loss_reason(error)}; finished blocks are safe, type the same command again"
            ) from None
        finally:
            self.pool.close()

    def _plan_wave(self, first: int) -> Wave:
        """Adds the workers that the cluster has room for by now, and plans their blocks of the next wave."""
        self._begin_embedding(first)
        self.pool.acquire()
        found, wanted = len(self.pool.workers), self.ready.config.workers or 0
        if found < wanted:
            text = f"{wanted} workers were asked for, the cluster has room for {found} now"
            self.listen("note", {"text": text})
        wave = plan_wave(self.ready.task, self.pool.capacities(), first)
        self.number += 1
        stages = [self.pool.label(part.worker) | {"blocks": [b.index for b in part.blocks]} for part in wave]
        last = wave[-1].blocks[-1].index
        self.listen("wave", {"number": self.number, "first": first, "last": last, "stages": stages})
        return wave

    def _begin_embedding(self, first: int) -> None:
        """Starts the embedder beside the workers, since its imports take as long as theirs. On GPUs, which workers
        then need, the first block's inputs are made before the workers start."""
        ready = self.ready
        if first == 0 and ready.config.embeds_on == "cuda":
            self.pool.embed_on_gpus({i: s for i, s in enumerate(ready.samples) if not ready.entering(0, i)})
        elif first == 0 and ready.entering(0, 0) is None:
            self.pool.embedder()

    def _run_wave(self, wave: Wave) -> None:
        """Streams the batches through a wave and fits its blocks, and does so again when a worker was lost.

        Returns early when a lost worker could not be replaced: what is left is then planned for the other workers.
        Raises TemporaryError as `_count_loss` does.
        """
        again = False
        to_load: list[int] | None = list(range(len(self.pool.workers)))
        while to_load is not None:
            try:
                self.pool.load(wave, to_load)
                self.streamer.stream(self.number, wave, again)
                asyncio.run(self.fitter.fit(wave))
                return
            except RayError as error:
                reason = loss_reason(error)
                self._count_loss(reason, out_of_memory(error) is not None)
            to_load, again = self._replace_lost(wave, reason), True

    def _count_loss(self, reason: str, memory: bool) -> None:
        """Raises TemporaryError when more than MAX_LOSSES were lost, or more than MAX_KILLED for want of memory, while
        no block was finished."""
        if (done := _num_finished(self.ready)) > self.done:
            self.losses, self.killed, self.done = 0, 0, done
        self.losses, self.killed = self.losses + 1, self.killed + memory
        if self.losses > MAX_LOSSES or self.killed > MAX_KILLED:
            raise TemporaryError(
                f"a worker was lost {self.losses} times while no block was finished, lastly: {reason}. Finished blocks "
                "are safe; if memory ran out, give fewer --blocks-per-worker, --samples-per-batch or --workers, and "
                "continue"
            )

    def _replace_lost(self, wave: Wave, reason: str) -> list[int] | None:
        """Starts workers in the place of lost ones, and returns their numbers; None when there is no room for all."""
        lost = self.pool.lost()
        numbers = [self.pool.workers.index(worker) for worker in lost]
        blocks = {part.worker: [block.index for block in part.blocks] for part in wave}
        for number, worker in zip(numbers, lost, strict=True):
            why = self.pool.heartbeats.ended.get(worker.actor, reason)
            self.listen("lost", self.pool.label(number) | {"reason": why, "blocks": blocks.get(number, [])})
        replaced = [self.pool.replace(worker) for worker in lost]
        return numbers if all(replaced) else None


def _num_finished(ready: Prepared) -> int:
    """Number of blocks that every run has finished."""
    return sum(ready.is_finished(block.index) for block in ready.model.blocks)


@contextmanager
def _journaled(listen: Listener, ready: Prepared) -> Iterator[Listener]:
    """A listener that passes events on to `listen` and to the journal of each run. When the call ends early, a last
    event says why."""
    listen_all = _all_of(listen, *(Journal(run.store.root / JOURNAL, listen) for run in ready.runs))
    try:
        yield listen_all
    except BaseException as error:
        listen_all("stop", {"reason": str(error) or type(error).__name__})
        raise


def _all_of(*listeners: Listener) -> Listener:
    def tell(event: str, data: dict[str, Any]) -> None:
        for listen in listeners:
            listen(event, data)

    return tell
