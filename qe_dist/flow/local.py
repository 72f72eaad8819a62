"""The whole pipeline in one process: the specification of what the Ray driver does."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from qe_dist import archs
from qe_dist.core.batch import held_out_below, sample_keys
from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import Sample
from qe_dist.core.source import WeightSource
from qe_dist.core.spec import ModelSpec
from qe_dist.flow.calibrate import Embedder, batch_tokens, make_batches
from qe_dist.flow.config import POLICY, RunConfig, check_siblings, padded_alike
from qe_dist.flow.plan import Task, Wave, WorkerCapacity, check_runs, local_capacities, make_plan, plan_wave
from qe_dist.flow.serving import check_serving
from qe_dist.flow.source import open_source
from qe_dist.flow.stage import Stage
from qe_dist.io.checkpoint import assemble, put_passthrough
from qe_dist.io.lock import RunLock
from qe_dist.io.remote import Mirror
from qe_dist.io.run_dir import RunDir
from qe_dist.io.spool import Spooled
from qe_dist.io.weights import upper_bytes
from qe_dist.methods import AXES
from qe_dist.methods.recipes import recipe_from

log = logging.getLogger("qe_dist")


def quantize(*runs: RunConfig) -> None:
    """Quantizes `run.model` into `run.output`; continues where an earlier, interrupted call stopped.

    Several runs may differ in recipe and output: one pass of the calibration serves them all.
    """
    capacities = local_capacities(runs[0])
    ready = prepare_run(*runs, capacities=capacities)
    with opened(ready) as (ready, lease), closing(Embedder(ready.run, ready.model.arch)) as embedder:
        start(ready)
        while (first := ready.next_block()) is not None:
            wave = plan_wave(ready.task, capacities, first)
            with ExitStack() as open_stages:
                stages = [open_stages.enter_context(closing(Stage(ready.runs, ready.model.arch))) for _ in wave]
                for stage, part in zip(stages, wave, strict=True):
                    stage.load(part)
                for i, samples in enumerate(ready.samples):
                    batch = ready.entering(first, i) or embedder.embed(i, samples)
                    for stage in stages[:-1]:
                        batch = stage.forward(batch)
                    stages[-1].finish(batch, ready.block_after(wave))
                embedder.flush()
                stages[-1].flush()
                for stage, part in zip(stages, wave, strict=True):
                    for block in part.blocks:
                        lease.check()
                        stage.fit(block.index)
                        lease.sync()
            ready.store.drop_batches_before(first)
        finish(ready, lease)


@dataclass(frozen=True)
class Prepared:
    """Runs that can begin: nothing is computed or written yet."""

    runs: tuple[RunConfig, ...]
    """They share one pass of the calibration and differ in their recipe."""
    samples: list[list[Sample]]
    source: WeightSource
    model: ModelSpec
    identities: Mapping[RunConfig, Mapping[str, Any]]

    @property
    def run(self) -> RunConfig:
        """The first, in whose directory activations are spooled; any of them where none is left."""
        return (*self.runs, *self.identities)[0]

    @cached_property
    def task(self) -> Task:
        pixels = archs.get(self.model.arch).pixels_per_token(self.source.config)
        return Task(self.model, self.runs, batch_tokens(self.samples, pixels), sum(map(len, self.samples)))

    @property
    def store(self) -> RunDir:
        return RunDir(self.run.output)

    def is_finished(self, block: int) -> bool:
        """By every run."""
        return all(RunDir(run.output).has_block(block) for run in self.runs)

    def next_block(self) -> int | None:
        """Where the next wave begins: the last block in front of all that is unfinished whose input is spooled."""
        for run in self.runs:
            RunDir(run.output).refresh()
        unfinished = next((b.index for b in self.model.blocks if not self.is_finished(b.index)), None)
        return None if unfinished is None else self.store.last_spooled(unfinished, len(self.samples))

    def entering(self, block: int, index: int) -> Spooled | None:
        """Batch `index` as it enters a block, or None for one that is to be embedded. Beyond block 0 nobody could make
        one that is not there (removed as damaged a moment ago, or not seen yet on NFS): who reads it says so."""
        return Spooled(block, index) if block > 0 or self.store.has_batch(block, index) else None

    def block_after(self, wave: Wave) -> int | None:
        """Whose input a wave leaves behind; None after the last one."""
        following = wave[-1].blocks[-1].index + 1
        return following if following < len(self.model.blocks) else None


def prepare_run(*runs: RunConfig, capacities: Sequence[WorkerCapacity] = ()) -> Prepared:
    """Reads samples and headers, and checks what can be checked now. Writes nothing.

    capacities: the workers, where they are known before the work begins.
    """
    runs = tuple(_with_policy(run) for run in runs)
    check_siblings(runs)
    samples = make_batches(runs[0])
    source = open_source(runs[0])
    model = archs.for_config(source.config).spec(source)
    for run in runs:
        _check_images(run, samples, source)
    images = [image for batch in samples for sample in batch for image in sample.images]
    identities = {run: run.identity(images) for run in runs}
    for run in runs:
        check_serving(model, run, source.config)
    check_runs(model, runs, upper_bytes(source, model.passthrough))
    ready = Prepared(runs, samples, source, model, identities)
    if capacities:
        make_plan(ready.task, capacities)
    return ready


class RunLease:
    """What a call holds: locks of its output directories, and their copies behind URLs."""

    def __init__(self, locks: Sequence[RunLock], mirrors: list[Mirror]) -> None:
        self.locks, self.mirrors = locks, mirrors

    def check(self) -> None:
        """QEError where another command took a directory over."""
        for lock in self.locks:
            lock.check()

    def sync(self) -> None:
        """Has what was finished copied, soon."""
        for mirror in self.mirrors:
            mirror.sync()

    def flush(self) -> None:
        """Returns when it is copied."""
        self.sync()
        for mirror in self.mirrors:
            mirror.flush()


@contextmanager
def opened(ready: Prepared) -> Iterator[tuple[Prepared, RunLease]]:
    """Makes or continues the run directories and holds them against other commands. What is left of the runs are those
    that are not finished."""
    with ExitStack() as held:
        lease = RunLease([held.enter_context(RunDir(run.output).lock()) for run in ready.runs], [])
        for run in ready.runs:
            store, identity = RunDir(run.output), ready.identities[run]
            if run.mirror is not None:
                lease.mirrors.append(held.enter_context(Mirror(run.mirror, store)))
                lease.mirrors[-1].restore(identity, run.resume)
            if run.from_block:
                store.change(identity, POLICY, run.from_block)
            if store.open(identity, run.resume) and not store.is_complete:
                for fault in store.check_files():
                    log.warning("%s; it is made anew", fault)
            if store.is_complete:
                store.clean()
        lease.sync()
        yield replace(ready, runs=tuple(run for run in ready.runs if not RunDir(run.output).is_complete)), lease


def _with_policy(run: RunConfig) -> RunConfig:
    """With the recipes of the blocks before `from_block`, as the run directory has them."""
    if not run.from_block:
        return run
    before = RunDir(run.output).identity()
    policy = [*before["earlier"], [before["from_block"], before["recipe"]]]
    earlier = tuple((first, recipe_from(content)) for first, content in policy if first < run.from_block)
    for _, recipe in earlier:
        if recipe.rotation != run.recipe.rotation:
            raise ConfigError(f"from block {run.from_block} on the model would be rotated differently; it is one model")
        if not padded_alike(run, recipe):
            raise ConfigError(f"from block {run.from_block} on the model would be padded differently; it is one model")
    return replace(run, earlier=earlier)


def _check_images(run: RunConfig, samples: list[list[Sample]], source: WeightSource) -> None:
    """Refuses a recipe for images where there are none, and images where the model sees none."""
    shown = [sample for batch in samples for sample in batch if sample.images]
    blind = not archs.for_config(source.config).has_vision(source.config)
    if not run.recipe.needs().images:
        if shown and blind:
            raise ConfigError(f"{shown[0].origin} has images, but {run.model} is a model of text only")
        return
    described = run.recipe.describe()
    names = " and ".join(f"{a} {described[a]['name']}" for a in AXES if getattr(run.recipe, a).needs().images)
    if blind:
        raise ConfigError(f"{run.model} is a model of text only, but {names} are made for images")
    below = held_out_below(sum(map(len, samples)))
    ids = torch.tensor([sample.index for sample in shown], dtype=torch.int64)
    if not (sample_keys(ids) >= below).any():
        found = "images only in samples that are held out to measure on" if len(ids) else "no image"
        raise ConfigError(f"{run.calibration} has {found}, but {names} must see some; add samples with images")


def start(ready: Prepared) -> None:
    """Writes what is taken over unchanged."""
    for run in ready.runs:
        put_passthrough(RunDir(run.output), ready.model, ready.source)


def finish(ready: Prepared, lease: RunLease) -> None:
    """Everything is fitted: put the checkpoints together and drop what only a continuation would need."""
    lease.flush()
    for run in ready.runs:
        store = RunDir(run.output)
        assemble(store, ready.model, ready.source, run.recipe.describe(), ready.identities[run])
        store.clean()
    lease.sync()
