"""The blocks of a wave are fitted in parallel. The worker that holds a block owns it: it publishes the block, and other
workers fit some of its groups when that is faster (`balance.py`). Where a run tunes, the closed forms are fitted in
parallel, and the blocks are tuned in order: each needs what the tuned blocks before it make of the calibration."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayError

from qe_cluster.balance import balance, fit_cost, travel_bytes
from qe_cluster.watching import Monitor
from qe_cluster.workers import WorkerPool, loss_reason, transfer_bytes
from qe_dist.flow.local import Prepared
from qe_dist.flow.plan import FitJob, StagePlan, Wave, plan_wave


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
        lists = self.monitor.wait([workers[part.worker].actor.jobs.remote() for part in wave])
        owners = {job: part.worker for part, jobs in zip(wave, lists, strict=True) for job in jobs}
        places = self._places(owners)
        order = _Order(wave)
        async with self.monitor.beating():
            stages = (self._fit_stage(part, jobs, places, order) for part, jobs in zip(wave, lists, strict=True))
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

    async def _fit_stage(
        self, part: StagePlan, jobs: Sequence[FitJob], places: Mapping[FitJob, int], order: "_Order"
    ) -> None:
        """Fits the blocks of one worker, one after the other; each is published as soon as it is fitted."""
        try:
            for block in part.blocks:
                self.monitor.lease.check()
                if self.monitor.stopping:
                    return
                await self._fit_block(part.worker, block.index, jobs, places, order)
                order.finished[block.index].set_result(True)
        except _NotReached:
            return  # whoever was to finish the block before says why
        finally:
            order.give_up(part)

    async def _fit_block(
        self, owner: int, index: int, jobs: Sequence[FitJob], places: Mapping[FitJob, int], order: "_Order"
    ) -> None:
        begin, home = time.perf_counter(), self.pool.workers[owner].actor
        left = [job for job in jobs if job.block == index]
        for number, run in enumerate(self.ready.configs):
            own = [job for job in left if job.run == number]
            if own:
                await self._fit_run(owner, own, places, order)
            elif run.recipe_for(index).tuning is not None:
                await order.reached(index)
                await home.pass_on.remote(number, index)
        if left:
            self.ready.drop_spent(order.first, index)
            self.monitor.lease.sync()
            report = self.ready.store.block_report(index) | self.pool.label(owner)
            self.monitor.listen("block", report | {"seconds": time.perf_counter() - begin})

    async def _fit_run(self, owner: int, jobs: Sequence[FitJob], places: Mapping[FitJob, int], order: "_Order") -> None:
        """Fits the groups of a block for one run. When a helper is lost, the owner fits them all by itself."""
        try:
            await self._fit_groups(owner, jobs, places, order)
        except RayError as error:
            if all(places[job] == owner for job in jobs):
                raise
            loss_reason(error)  # raises what is no loss of a worker
            await self._fit_groups(owner, jobs, dict.fromkeys(jobs, owner), order)

    async def _fit_groups(
        self, owner: int, jobs: Sequence[FitJob], places: Mapping[FitJob, int], order: "_Order"
    ) -> None:
        home, at = self.pool.workers[owner].actor, {job: self.pool.workers[places[job]].actor for job in jobs}
        asks = {}
        for job in sorted(jobs, key=lambda job: places[job] == owner):  # what other workers wait for goes first
            problem = None if places[job] == owner else home.problem.remote(job)
            asks[job] = at[job].draft.remote(job, problem)
        answers = await asyncio.gather(*(_result(asks[job]) for job in jobs))
        names = [job.group for job in jobs]
        run, index = jobs[0].run, jobs[0].block
        recipe = self.ready.configs[run].recipe_for(index)
        granted = recipe.grant(dict(zip(names, answers, strict=True)))
        groups = [at[job].settle.remote(job, granted[job.group]) for job in jobs]
        if recipe.tuning is not None:
            await order.reached(index)
        try:
            await home.publish.remote(run, index, names, *groups)
        except RayActorError:
            if not self.ready.runs[run].store.has_block(index):  # else only its answer was lost with the worker
                raise


class _NotReached(Exception):
    """The block before the one that is to be tuned will not be finished."""


class _Order:
    """Which blocks of a wave are finished, for those that are tuned on what comes out of the block before them."""

    def __init__(self, wave: Wave) -> None:
        self.first = wave[0].blocks[0].index
        loop = asyncio.get_running_loop()
        self.finished = {block.index: loop.create_future() for part in wave for block in part.blocks}

    async def reached(self, index: int) -> None:
        """Returns when the block before this one is finished. Raises _NotReached where it will not be."""
        before = self.finished.get(index - 1)
        if before is not None and not await before:
            raise _NotReached

    def give_up(self, part: StagePlan) -> None:
        """No further block of this worker will be finished."""
        for block in part.blocks:
            if not self.finished[block.index].done():
                self.finished[block.index].set_result(False)


async def _result(ref: Any) -> Any:
    """Makes a coroutine of a reference, for `asyncio.gather`."""
    return await ref
