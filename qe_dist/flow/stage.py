"""The work of one worker: forward batches through its blocks, gather statistics, fit and publish.

Ray makes an actor of it. Batches are counted in order of their index: statistics are sums, and only a
fixed order of summation gives the same bits whatever the number of workers. A batch that was counted already is only
forwarded, so a wave may be streamed again for a worker that was lost. One pass of statistics serves any number of runs
that differ in their recipe.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from qe_dist import archs
from qe_dist.core.batch import PADDING, Batch
from qe_dist.core.determinism import pin
from qe_dist.core.machine import cpu_name, give_back_memory, matmul_rate
from qe_dist.core.quantized import QuantizedGroup
from qe_dist.core.source import WeightSource
from qe_dist.core.spec import BlockSpec, InputGroup, view_of
from qe_dist.flow.config import RunConfig, needs_of
from qe_dist.flow.plan import FitJob, StagePlan
from qe_dist.flow.source import open_source
from qe_dist.flow.tuning import QuantizedPath
from qe_dist.io.checkpoint import block_tensors, report_dict
from qe_dist.io.run_dir import RunDir
from qe_dist.io.spool import Spool, Spooled
from qe_dist.methods.base import GroupProblem
from qe_dist.methods.recipe import Ask, Draft
from qe_dist.numerics.hadamard import Signs, rotate_blocks, rotate_weight, unit
from qe_dist.numerics.stats import GroupStats, TokenSample


class Stage:
    """Consecutive blocks on one device, other ones in every wave. Finished blocks only forward."""

    def __init__(self, runs: Sequence[RunConfig], arch: str) -> None:
        self.run, self.runs, self.arch = runs[0], runs, archs.get(arch)
        pin(self.run.threads)
        self.arch.warm_up()
        self.stores = [RunDir(run.output) for run in runs]
        self.spool = Spool(self.stores[0])
        self.blocks: dict[int, _Block] = {}
        self.drafts: dict[FitJob, Draft] = {}
        self.paths: dict[int, QuantizedPath] = {}
        """The quantized inputs of the runs that tune, by the number of the run."""
        self.num_counted = 0
        self.activity = "idle"
        self.seconds = {"load": 0.0, "forward": 0.0, "fit": 0.0, "tune": 0.0}

    @cached_property
    def source(self) -> WeightSource:
        """The model that is quantized. Opened when a block is first asked for, since that reads every header."""
        return open_source(self.run)

    def load(self, part: StagePlan) -> None:
        """Reads the weights of the blocks of a wave, and drops those of the wave before."""
        with self._busy("load"):
            self.blocks, self.drafts, self.num_counted = {}, {}, 0
            self.prefetch(part.blocks)
            self.blocks = {spec.index: _Block(self, spec, part) for spec in part.blocks}
            if part.blocks and not self.paths:
                self.paths = {
                    number: QuantizedPath(run, self.arch, self.spool, part.num_blocks, part.num_batches)
                    for number, run in enumerate(self.runs)
                    if run.recipe.tuning is not None
                }

    def prefetch(self, blocks: Sequence[BlockSpec]) -> None:
        """Begins to read the weights of the next wave, and returns at once."""
        names = self.source.names()
        self.source.prefetch([name for spec in blocks for name in names if name.startswith(spec.prefix)])

    def counted(self) -> int | None:
        """Number of batches in the statistics; None when every block is finished, so that nothing is counted."""
        return self.num_counted if any(block.stats for block in self.blocks.values()) else None

    def forward(self, batch: Batch | Spooled, stay: bool = False) -> Batch:
        """Returns the batch with the hidden states after this stage's blocks. Counts it into the statistics, unless it
        was counted before.

        stay: leaves the batch on the device, for a transport that takes it from there. Raises LookupError when batches
        before this one are missing.
        """
        with self._busy("forward"):
            if isinstance(batch, Spooled):
                batch = self.spool.get(batch)
            if batch.index > self.num_counted and self.counted() is not None:
                raise LookupError(f"batch {batch.index} came before batch {self.num_counted}")
            is_next = batch.index == self.num_counted
            here = batch.to(self.run.device)  # once, with all that the blocks read beside the hidden states
            for block in self.blocks.values():
                here = here.with_hidden(block.forward(here, count=is_next))
            self.num_counted += is_next
            left = here if stay else batch.with_hidden(here.hidden).to("cpu")
            return self.arch.passed_on(left, max(self.blocks))

    def finish(self, batch: Batch | Spooled, next_block: int | None) -> tuple[int, int]:
        """Forwards a batch through the last stage of a wave and spools it as input of `next_block`, if there is one.
        Returns its tokens and bytes."""
        batch = self.forward(batch)
        if next_block is not None:
            self.spool.put(next_block, batch)
        return batch.num_tokens, batch.num_bytes

    def flush(self) -> None:
        """Returns when every spooled batch is on disk."""
        self.spool.flush()

    def close(self) -> None:
        """Ends the threads of the spool. Batches that were not flushed may be missing."""
        self.spool.close()
        for path in self.paths.values():
            path.close()

    # -- fits: any worker may fit a group, the worker that holds the block publishes it

    def jobs(self) -> list[FitJob]:
        """The fits of every group of every unfinished block here, block by block."""
        return [
            FitJob(run, index, group.name)
            for index, block in self.blocks.items()
            for run, store in enumerate(self.stores)
            if not store.has_block(index)
            for group in block.view(self.runs[run]).groups
        ]

    def problem(self, job: FitJob) -> GroupProblem:
        """Everything that a fit needs, to send to another worker."""
        block, run = self.blocks[job.block], self.runs[job.run]
        return block.problem(block.view(run).group(job.group), run)

    def draft(self, job: FitJob, problem: GroupProblem | None = None) -> Ask | None:
        """Transforms and rounds a group. Returns what it asks of the block's byte budget, if it does.

        problem: of a group whose block another worker holds.
        """
        with self._busy("fit"):
            self.drafts[job] = self.runs[job.run].recipe_for(job.block).draft(problem or self.problem(job))
            return self.drafts[job].ask

    def settle(self, job: FitJob, granted: int | None) -> QuantizedGroup:
        """Adds the repair that was granted to a drafted group, and returns the group."""
        with self._busy("fit"):
            return self.runs[job.run].recipe_for(job.block).settle(self.drafts.pop(job), granted)

    def publish(self, run: int, index: int, names: Sequence[str], *groups: QuantizedGroup) -> dict[str, Any]:
        """Tunes a block whose groups are settled, if the run does, and writes it. Returns its report. Drops its
        statistics after the last run."""
        block, path = self.blocks[index], self.paths.get(run)
        view, said = block.view(self.runs[run]), {}
        done: Mapping[str, QuantizedGroup] = dict(zip(names, groups, strict=True))
        if path is not None:
            with self._busy("tune"):
                problems = block.problems(self.runs[run])
                tuned = path.tune(block.module, view, done, problems, block.held_out_below, self._watch)
                done, said = tuned.groups, {"tuning": asdict(tuned.report)}
        with self._busy("fit"):
            store, start = self.stores[run], self.runs[run].start_of(index)
            made = said | {"recipe_from": start, "device": self.run.device, "threads": self.run.threads}
            tensors = block_tensors(view, done, self.source)
            store.put_block(index, tensors, report_dict(view, done, tensors) | made)
            if path is not None:
                path.forget(index)
            if all(store.has_block(index) for store in self.stores):
                block.stats.clear()
            return store.block_report(index)

    def _watch(self, step: int, loss: float) -> None:
        self.activity = f"tune, step {step}: {loss:.2f} of the loss"

    def pass_on(self, run: int, index: int) -> None:
        """Makes what enters the block behind a finished one, where the run is to tune that and nobody has it."""
        if run in self.paths:
            with self._busy("tune"):
                block = self.blocks[index]
                self.paths[run].catch_up(block.module, block.view(self.runs[run]))

    def fit(self, index: int) -> None:
        """Fits and publishes a block in this process, one group after the other."""
        for run in range(len(self.runs)):
            jobs = [job for job in self.jobs() if (job.run, job.block) == (run, index)]
            asks = {job.group: self.draft(job) for job in jobs}
            granted = self.runs[run].recipe_for(index).grant(asks)
            if jobs:
                self.publish(run, index, list(asks), *(self.settle(job, granted[job.group]) for job in jobs))
            else:
                self.pass_on(run, index)

    # -- reports

    def usage(self) -> dict[str, Any]:
        """Current activity, seconds by activity, blocks, and memory of this process in MiB, now and at its peak."""
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        now = psutil.Process().memory_info().rss / 2**20
        return self.seconds | {
            "activity": self.activity,
            "blocks": list(self.blocks),
            "memory_mib": now,
            "peak_mib": peak,
        }

    def survey(self) -> dict[str, Any]:
        """Kind, speed and free bytes of the device, and whether tensors can leave it directly."""
        pin(self.run.threads)
        host = psutil.virtual_memory().available
        kind, free = f"{cpu_name()}, {self.run.threads} threads", host
        if self.run.device == "cuda":
            kind, free = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]
        facts = {"kind": kind, "free": free, "host": host, "has_nixl": find_spec("nixl") is not None}
        return facts | {"speed": matmul_rate(self.run.device, self.run.dtype)}

    @contextmanager
    def _busy(self, activity: str) -> Iterator[None]:
        pin(self.run.threads)  # a setting of the thread, and this need not be the one that ran `__init__`
        self.activity, start = activity, time.perf_counter()
        if activity != "forward":
            give_back_memory()
        try:
            yield
        finally:
            if activity != "forward":
                give_back_memory()
            self.seconds[activity] += time.perf_counter() - start
            self.activity = "idle"


class _Block:
    """One block of a stage: its module, and the statistics of its groups while it is not finished."""

    def __init__(self, stage: Stage, spec: BlockSpec, part: StagePlan) -> None:
        run, self.arch, self.spec, self.held_out_below = stage.run, stage.arch, spec, part.held_out_below
        self.module = stage.arch.block(stage.source, spec, run.device, run.dtype)
        self.inputs: dict[str, Tensor] = {}
        self.rotation, self.ranks = run.recipe.rotation, run.tensor_parallel_size
        self.stats: dict[str, GroupStats] = {}
        waiting = [r for r, store in zip(stage.runs, stage.stores, strict=True) if not store.has_block(spec.index)]
        self.views = {g: view_of(spec, g) for g in {r.recipe_for(spec.index).granularity: None for r in waiting}}
        for view in self.views.values():
            for group in view.groups:
                self.stats[group.name] = GroupStats.empty(
                    self.weights(group),
                    view.router_width(group),
                    needs_of(waiting, spec.index),
                    run.sample_tokens,
                    "cpu" if part.grams_on_host else None,
                )
                reader = self.module.get_submodule(group.linears[0].name)
                reader.register_forward_pre_hook(self._catcher(group.name))

    def view(self, run: RunConfig) -> BlockSpec:
        """The block's groups as this run's recipe wants them."""
        return run.recipe_for(self.spec.index).view(self.spec)

    def _catcher(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        inputs = self.inputs  # self holds the module: with it, only the garbage collector would free both

        def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0]

        return catch

    def rotation_of(self, group: InputGroup) -> Signs:
        """The factors of the rotation at run time. Groups are fitted and measured in the rotated coordinates."""
        return () if self.rotation is None else self.rotation.at_run_time(group, self.ranks)

    def weights(self, group: InputGroup) -> Mapping[str, Tensor]:
        """Weights of the group's linears by name, in float32, rotated as at run time."""
        weights = {x.name: self.module.get_parameter(f"{x.name}.weight") for x in group.linears}
        rotation = self.rotation_of(group)
        return {name: rotate_weight(weight.float(), rotation) for name, weight in weights.items()}

    def forward(self, batch: Batch, count: bool) -> Tensor:
        """Hidden states after the block. batch: on the block's device. count: adds its tokens to the statistics."""
        hidden = self.arch.run_block(self.module, batch, self.spec.index)
        if self.stats and count:
            real, held_out = batch.modality != PADDING, batch.held_out(self.held_out_below)
            self._count(batch, real & ~held_out, GroupStats.update)
            if held_out.any():
                self._count(batch, real & held_out, GroupStats.hold_out)
        self.inputs.clear()
        return hidden

    def _count(self, batch: Batch, which: Tensor, add: Callable[..., None]) -> None:
        """Adds these tokens [B, L] to the statistics of every group."""
        modality, keys = batch.modality[which], batch.token_keys()[which]
        rows = {name: x[which] for name, x in self.inputs.items()}
        for group in (g for view in self.views.values() for g in view.groups):
            x = rows[group.name]
            if rotation := self.rotation_of(group):
                factors = unit((factor.to(x.device) for factor in rotation), torch.float32)
                x = rotate_blocks(x.float(), factors).to(x.dtype)
            add(self.stats[group.name], x, rows[group.router_input], modality, keys)

    def problems(self, run: RunConfig) -> dict[str, GroupProblem]:
        """Returns the problem of every group, by name."""
        return {group.name: self.problem(group, run) for group in self.view(run).groups}

    def problem(self, group: InputGroup, run: RunConfig) -> GroupProblem:
        scheme, seed = run.recipe_for(self.spec.index).scheme, run.seed + 1000 * self.spec.index
        weights, stats = self.weights(group), self.stats[group.name]
        if stats.gram is not None:
            stats = replace(stats, gram=stats.gram.to(next(iter(weights.values())).device))
        if group.router_input == group.name:  # the router reads the group's own input, which is the sample
            sample, held_out = (_routed_on_own(t, self.rotation_of(group)) for t in (stats.sample, stats.held_out))
            stats = replace(stats, sample=sample, held_out=held_out)
        return GroupProblem(group, weights, stats, scheme, seed, rotation=self.rotation_of(group))


def _routed_on_own(tokens: TokenSample, rotation: Signs) -> TokenSample:
    """The sample with the group's own input, before rotation, as the input of the router."""
    back = tuple(factor.T for factor in rotation)
    return replace(tokens, router_x=rotate_weight(tokens.x, back))
