"""The blocks of a wave are fitted in parallel. The worker that holds a block owns it: it publishes the block, and other
workers fit some of its groups when that is faster (`balance.py`)."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ray.exceptions import RayError

from qe_cluster.balance import balance, fit_cost, travel_bytes
from qe_cluster.watching import Monitor
from qe_cluster.workers import WorkerPool, loss_reason, transfer_bytes
from qe_dist.flow.local import Prepared
from qe_dist.flow.plan import FitJob, Wave, plan_wave


class Fitter:
    """Fits and publishes the blocks of a wave whose batches have been streamed."""

    def __init__(self, ready: Prepared, pool: WorkerPool, monitor: Monitor) -> None:
        self.ready, self.pool, self.monitor = ready, pool, monitor

    async def fit(self, wave: Wave) -> None:
        """Returns when every block of the wave is published.

        Raises RayError when the owner of a block is lost, and Stopped when the caller asked to stop; every block that
        was begun elsewhere is published first.
        """
        workers = self.pool.workers
        self._prefetch_after(wave)
        lists = await asyncio.gather(*(_result(workers[part.worker].actor.jobs.remote()) for part in wave))
        owners = {job: part.worker for part, jobs in zip(wave, lists, strict=True) for job in jobs}
        places = self._places(owners)
        async with self.monitor.reporting():
            stages = (self._fit_stage(part.worker, jobs, places) for part, jobs in zip(wave, lists, strict=True))
            ends = await asyncio.gather(*stages, return_exceptions=True)
        for end in ends:
            if end is not None:
                raise end
        self.monitor.check_stop()

    def _prefetch_after(self, wave: Wave) -> None:
        """Has the weights of the next wave read ahead, as it would be planned now."""
        after = self.ready.block_after(wave)
        if after is not None:
            for part in plan_wave(self.ready.task, self.pool.capacities(), after):
                self.pool.workers[part.worker].actor.prefetch.remote(part.blocks)

    def _places(self, owners: Mapping[FitJob, int]) -> dict[FitJob, int]:
        """The worker that fits each job."""
        groups = {job: self._group(job) for job in owners}
        limit, speeds = transfer_bytes(), [capacity.speed for capacity in self.pool.capacities()]
        stay = {job for job, group in groups.items() if travel_bytes(group, self.ready.task, job.block) > limit}
        return balance({job: fit_cost(group) for job, group in groups.items()}, owners, speeds, stay)

    def _group(self, job: FitJob) -> Any:
        recipe = self.ready.configs[job.run].recipe_for(job.block)
        return recipe.view(self.ready.model.blocks[job.block]).group(job.group)

    async def _fit_stage(self, owner: int, jobs: Sequence[FitJob], places: Mapping[FitJob, int]) -> None:
        """Fits the blocks of one worker, one after the other; each is published as soon as it is fitted."""
        for index, of_block in groupby(jobs, key=lambda job: job.block):
            self.monitor.lease.check()
            if self.monitor.stopping:
                return
            begin = time.perf_counter()
            for _, of_run in groupby(of_block, key=lambda job: job.run):
                await self._fit_block(owner, list(of_run), places)
            self.monitor.lease.sync()
            report = self.ready.store.block_report(index) | self.pool.label(owner)
            self.monitor.listen("block", report | {"seconds": time.perf_counter() - begin})

    async def _fit_block(self, owner: int, jobs: Sequence[FitJob], places: Mapping[FitJob, int]) -> None:
        """Fits the groups of a block for one run. When a helper is lost, the owner fits them all by itself."""
        try:
            await self._fit_groups(owner, jobs, places)
        except RayError as error:
            if all(places[job] == owner for job in jobs):
                raise
            loss_reason(error)  # raises what is no loss of a worker
            await self._fit_groups(owner, jobs, dict.fromkeys(jobs, owner))

    async def _fit_groups(self, owner: int, jobs: Sequence[FitJob], places: Mapping[FitJob, int]) -> None:
        home, at = self.pool.workers[owner].actor, {job: self.pool.workers[places[job]].actor for job in jobs}
        asks = {}
        for job in sorted(jobs, key=lambda job: places[job] == owner):  # what other workers wait for goes first
            problem = None if places[job] == owner else home.problem.remote(job)
            asks[job] = at[job].draft.remote(job, problem)
        answers = await asyncio.gather(*(_result(asks[job]) for job in jobs))
        names = [job.group for job in jobs]
        run, index = jobs[0].run, jobs[0].block
        granted = self.ready.configs[run].recipe_for(index).grant(dict(zip(names, answers, strict=True)))
        groups = [at[job].settle.remote(job, granted[job.group]) for job in jobs]
        await home.publish.remote(run, index, names, *groups)


async def _result(ref: Any) -> Any:
    """Makes a coroutine of a reference, for `asyncio.gather`."""
    return await ref
