"""`qe_dist/flow/local.py` on ObjectRefs: the same calls, the same bytes, several blocks at once, and nobody is
indispensable.

Batches flow through the chain of stage actors as references (stage k takes batch i + 1 while stage k + 1 takes batch
i); weights and statistics stay, but for a group that is fitted by who is idle. An actor runs its calls in the order
they were made, so its fits see all its batches. When a worker is lost, another one loads its blocks and the wave is
streamed again: who has counted a batch only forwards it, and a block that is finished stays finished.
"""

import asyncio
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from qe_cluster.launch import cluster_address, ray_cluster
from qe_cluster.metrics import Metrics
from qe_cluster.workers import Worker, WorkerPool
from qe_dist import __version__
from qe_dist.core.errors import QEError, Stopped
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import Prepared, RunLease, finish, opened, prepare_run, start
from qe_dist.flow.plan import FitJob, StagePlan, Wave, balance, fit_cost, local_capacities, plan_wave, travel_bytes
from qe_dist.io.checkpoint import read_manifest
from qe_dist.io.journal import JOURNAL, Journal

IN_FLIGHT_PER_STAGE = 2
STORE_SHARE = 4  # a batch in flight may lie in the object store twice, and half of the store is left to others
LOSSES = 5  # in a row without a block finished: then it is no accident
WATCH = 2.0  # seconds between two looks at the workers
Listener = Callable[[str, dict[str, Any]], None]


@dataclass
class Summary:
    seconds: float
    stages: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    fallbacks: dict[str, list[str]] = field(default_factory=dict)
    continued: int = 0
    """Blocks that an earlier call had finished."""


def quantize(
    *runs: RunConfig,
    address: str | None = None,
    listen: Listener = lambda *_: None,
    stop: threading.Event | None = None,
    patience: float = 60.0,
) -> Summary:
    """Quantizes on a Ray cluster; see `flow.local.quantize` for what, this file for how. The summary's
    fall-backs are those of the first run.

    stop: when it is set, the batches and blocks in flight are finished and `Stopped` is raised.
    patience: seconds to wait for the workers that were asked for; a cluster that grows on demand needs minutes.
    """
    begin, address = time.perf_counter(), cluster_address(address)
    ready = prepare_run(*runs, capacities=local_capacities(runs[0]) if address is None else ())
    with opened(ready) as (ready, lease), _last_word(listen, ready) as listen:
        summary = Summary(0.0, continued=sum(ready.is_finished(b.index) for b in ready.model.blocks))
        with ThreadPoolExecutor(1) as aside:
            passed_on = aside.submit(start, ready)
            if ready.next_block() is not None:
                with ray_cluster(address, (runs[0].workers or 1) * runs[0].threads), Metrics() as metrics:
                    told = _all_of(listen, metrics)
                    _Call(ready, told, stop or threading.Event(), lease, patience, summary).run()
            passed_on.result()
        finish(ready, lease)
        summary.fallbacks = dict(read_manifest(runs[0].output).fallbacks)
        summary.seconds = time.perf_counter() - begin
        listen("done", {"seconds": summary.seconds})
    return summary


@contextmanager
def _last_word(listen: Listener, ready: Prepared) -> Iterator[Listener]:
    """To the caller and to the journal of each run. A call that ends early says why."""
    told = _all_of(listen, *(Journal(run.store.root / JOURNAL, listen) for run in ready.runs))
    try:
        yield told
    except BaseException as error:
        told("stop", {"reason": str(error) or type(error).__name__})
        raise


class _Call:
    """One call of the command, from wave to wave."""

    def __init__(
        self,
        ready: Prepared,
        listen: Listener,
        stop: threading.Event,
        lease: RunLease,
        patience: float,
        summary: Summary,
    ) -> None:
        self.ready, self.listen, self.stop, self.lease, self.summary = ready, listen, stop, lease, summary
        self.pool = WorkerPool(ready.configs, ready.model.arch, patience)
        self.number = 0
        """Of the wave, from 1 on."""
        self.watched: dict[Any, int] = {}
        self.last_look = time.monotonic()

    def run(self) -> None:
        ready = self.ready
        counts = {"batches": len(ready.samples), "blocks": len(ready.model.blocks), "done": self.summary.continued}
        who = {"host": platform.node(), "pid": os.getpid(), "version": __version__}
        self.listen("start", counts | who | {"first": ready.next_block(), "workers": ready.config.workers})
        try:
            self._waves()
            self.summary.stages = self.pool.usage()
        except RayError as error:
            raise QEError(f"{_reason(error)}; finished blocks are safe, type the same command again") from None
        finally:
            self.pool.close()

    def _waves(self) -> None:
        ready = self.ready
        while (first := ready.next_block()) is not None:
            if first == 0 and ready.config.embeds_on == "cuda":
                self.pool.embed_on_gpus({i: s for i, s in enumerate(ready.samples) if not ready.entering(0, i)})
            elif ready.entering(0, 0) is None and first == 0:
                self.pool.embedder()  # its imports take as long as those of the workers
            workers = self.pool.acquire()
            if len(workers) < (ready.config.workers or 0):
                told = f"{ready.config.workers} workers were asked for, the cluster has room for {len(workers)} now"
                self.listen("note", {"text": told})
            wave = plan_wave(ready.task, self.pool.capacities(), first)
            self.number += 1
            stages = [self._who(part.worker) | {"blocks": [b.index for b in part.blocks]} for part in wave]
            last = wave[-1].blocks[-1].index
            self.listen("wave", {"number": self.number, "first": first, "last": last, "stages": stages})
            self._wave(wave, workers)
            ready.store.drop_batches_before(first)

    def _wave(self, wave: Wave, workers: Sequence[Worker]) -> None:
        """Brings a wave to its end through the loss of workers; or back, to be planned anew with fewer of them."""
        parts = {part.worker: part for part in wave}
        losses, fresh = 0, list(range(len(workers)))
        while True:
            done = self._num_finished()
            try:
                ray.get([workers[i].actor.load.remote(parts.get(i, StagePlan(i, ()))) for i in fresh])
                self._stream(wave, again=losses > 0)
                asyncio.run(self._fit(wave))
                return
            except RayError as error:
                reason = _reason(error)
            losses = 1 if self._num_finished() > done else losses + 1
            if losses > LOSSES:
                raise QEError(
                    f"a worker was lost {losses} times while no block was finished, lastly: {reason}. Finished blocks "
                    "are safe; if memory ran out, give fewer --blocks-per-worker or --samples-per-batch, and continue"
                )
            self.pool.check_embedder()
            lost = self.pool.lost()
            for worker in lost:
                number = workers.index(worker)
                blocks = [block.index for block in parts[number].blocks] if number in parts else []
                self.listen("lost", self._who(number) | {"reason": reason, "blocks": blocks})
            fresh = [workers.index(worker) for worker in lost]
            replaced = [self.pool.replace(worker) for worker in lost]
            if not all(replaced):
                return

    def _num_finished(self) -> int:
        return sum(self.ready.is_finished(block.index) for block in self.ready.model.blocks)

    def _who(self, number: int) -> dict[str, Any]:
        return {"worker": number, "node": self.pool.workers[number].address}

    # -- batches

    def _stream(self, wave: Wave, again: bool) -> None:
        """Sends every batch that somebody lacks through the stages of a wave, a bounded number at a time."""
        ready, first, after = self.ready, wave[0].blocks[0].index, self.ready.block_after(wave)
        actors = [self.pool.workers[part.worker].actor for part in wave]
        begin, depth = self._lacking(actors, after)
        actors, after = actors[:depth], after if depth == len(wave) else None
        passes = [self.pool.forward(part.worker) for part in wave[: depth - 1]]
        if again and depth:
            self.listen("again", {"wave": self.number, "from_batch": begin})
        flight: deque[tuple[int, Any]] = deque()
        limit, tokens, store, embedder = IN_FLIGHT_PER_STAGE * depth, 0, _store_bytes(), None
        for index in range(begin if depth else len(ready.samples), len(ready.samples)):
            while len(flight) >= limit:
                count, size = self._land(flight)
                tokens += count
                limit = max(1, min(limit, store // (STORE_SHARE * size)))
            if self.stop.is_set():
                break
            batch = ready.entering(first, index)
            if batch is None:
                embedder = embedder or self.pool.embedder()
                batch = embedder.embed.remote(index, ready.samples[index])
            for forward in passes:
                batch = forward(batch)
            flight.append((index, actors[-1].finish.remote(batch, after)))
        while flight:
            tokens += self._land(flight)[0]
        ray.get([writer.flush.remote() for writer in (embedder, *actors[-1:]) if writer is not None])
        self._check_stop()
        self.pool.dismiss_embedders()
        if begin == 0 and depth:
            self.summary.tokens = tokens

    def _lacking(self, actors: Sequence[Any], after: int | None) -> tuple[int, int]:
        """The first batch that somebody lacks, and how many stages it has to go through."""
        batches = range(len(self.ready.samples))
        counted = ray.get([actor.counted.remote() for actor in actors])
        lacking = {j: count for j, count in enumerate(counted) if count is not None and count < len(batches)}
        unspooled = [i for i in batches if after is not None and not self.ready.store.has_batch(after, i)]
        depth = len(actors) if unspooled else max(lacking, default=-1) + 1
        return min([*unspooled[:1], *lacking.values()], default=0), depth

    def _land(self, flight: deque[tuple[int, Any]]) -> tuple[int, int]:
        index, landing = flight.popleft()
        tokens, size = ray.get(landing)
        self.listen("batch", {"wave": self.number, "index": index, "tokens": tokens})
        self.lease.check()
        self._look()
        return tokens, size

    # -- fits

    async def _fit(self, wave: Wave) -> None:
        """All workers fit at the same time, those that have no block left for those that have."""
        workers, capacities = self.pool.workers, self.pool.capacities()
        after = self.ready.block_after(wave)
        if after is not None:
            for part in plan_wave(self.ready.task, capacities, after):
                workers[part.worker].actor.prefetch.remote(part.blocks)
        lists = await asyncio.gather(*(_result(workers[part.worker].actor.jobs.remote()) for part in wave))
        owners = {job: part.worker for part, jobs in zip(wave, lists, strict=True) for job in jobs}
        places = self._places(owners, [capacity.speed for capacity in capacities])
        watch = asyncio.create_task(self._keep_looking())
        stages = (self._fit_stage(part.worker, jobs, places) for part, jobs in zip(wave, lists, strict=True))
        ends = await asyncio.gather(*stages, return_exceptions=True)
        watch.cancel()
        for end in ends:
            if end is not None:
                raise end
        self._check_stop()

    def _places(self, owners: Mapping[FitJob, int], speeds: Sequence[float]) -> dict[FitJob, int]:
        groups = {job: self._group(job) for job in owners}
        limit = _store_bytes() // STORE_SHARE
        stay = {job for job, group in groups.items() if travel_bytes(group, self.ready.task, job.block) > limit}
        return balance({job: fit_cost(group) for job, group in groups.items()}, owners, speeds, stay)

    def _group(self, job: FitJob) -> Any:
        recipe = self.ready.configs[job.run].recipe_for(job.block)
        return recipe.view(self.ready.model.blocks[job.block]).group(job.group)

    async def _fit_stage(self, owner: int, jobs: Sequence[FitJob], places: Mapping[FitJob, int]) -> None:
        """The blocks of one worker, one after the other, each published as it finishes."""
        for index, of_block in groupby(jobs, key=lambda job: job.block):
            self.lease.check()
            if self.stop.is_set():
                return
            begin = time.perf_counter()
            for _, of_run in groupby(of_block, key=lambda job: job.run):
                await self._fit_block(owner, list(of_run), places)
            self.lease.sync()
            report = self.ready.store.block_report(index) | self._who(owner)
            self.listen("block", report | {"seconds": time.perf_counter() - begin})

    async def _fit_block(self, owner: int, jobs: Sequence[FitJob], places: Mapping[FitJob, int]) -> None:
        try:
            await self._fit_groups(owner, jobs, places)
        except RayError as error:
            if all(places[job] == owner for job in jobs):
                raise
            _reason(error)
            await self._fit_groups(owner, jobs, dict.fromkeys(jobs, owner))  # a helper was lost

    async def _fit_groups(self, owner: int, jobs: Sequence[FitJob], places: Mapping[FitJob, int]) -> None:
        home, at = self.pool.workers[owner].actor, {job: self.pool.workers[places[job]].actor for job in jobs}
        asks = {}
        for job in sorted(jobs, key=lambda job: places[job] == owner):  # what others wait for goes first
            problem = None if places[job] == owner else home.problem.remote(job)
            asks[job] = at[job].draft.remote(job, problem)
        answers = await asyncio.gather(*(_result(asks[job]) for job in jobs))
        names = [job.group for job in jobs]
        run, index = jobs[0].run, jobs[0].block
        granted = self.ready.configs[run].recipe_for(index).grant(dict(zip(names, answers, strict=True)))
        groups = [at[job].settle.remote(job, granted[job.group]) for job in jobs]
        await home.publish.remote(run, index, names, *groups)

    # -- attention

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Stopped("stopped as asked; what is done is published, type the same command again to continue")

    async def _keep_looking(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(WATCH / 4)

    def _look(self) -> None:
        """Passes on what workers said of themselves, and asks again every now and then; never waits."""
        said, _ = ray.wait(list(self.watched), num_returns=len(self.watched), timeout=0) if self.watched else ([], [])
        for ref in said:
            number = self.watched.pop(ref)
            try:
                self.listen("worker", self._who(number) | ray.get(ref))
            except (RayError, IndexError):
                continue  # whoever waits for its work will notice
        if time.monotonic() - self.last_look > WATCH:
            self.last_look = time.monotonic()
            self.watched = {w.actor.usage.remote(): i for i, w in enumerate(self.pool.workers)}


def _all_of(*listeners: Listener) -> Listener:
    def tell(event: str, data: dict[str, Any]) -> None:
        for listen in listeners:
            listen(event, data)

    return tell


async def _result(ref: Any) -> Any:
    return await ref


def _store_bytes() -> int:
    """Of the smallest object store in the cluster."""
    return int(min(node["Resources"].get("object_store_memory", 2**30) for node in ray.nodes() if node["Alive"]))


def _reason(error: RayError) -> str:
    """Why a worker was lost, in a line. An error of the work itself is raised as itself."""
    cause: BaseException = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if not isinstance(cause, RayError):
        raise cause from (None if isinstance(cause, QEError) else error)
    said = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if getattr(cause, "actor_init_failed", False):
        raise QEError(f"a worker could not start: {said[-1]}; is qe_dist installed on every node?") from None
    line = next((line for line in said if " because " in line), said[0])
    return f"a worker died: {line.partition(' Some common causes')[0]}"
