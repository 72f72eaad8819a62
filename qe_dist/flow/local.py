"""The whole pipeline in one process: the specification of what the Ray driver does."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from qe_dist import archs
from qe_dist.core.batch import held_out_below, sample_keys
from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import Sample
from qe_dist.core.source import WeightSource
from qe_dist.core.spec import ModelSpec
from qe_dist.flow.calibrate import Calibration, Embedder, read_calibration
from qe_dist.flow.config import RunConfig, check_siblings
from qe_dist.flow.plan import Task, Wave, WorkerCapacity, check_runs, cost_notes, local_capacities, make_plan, plan_wave
from qe_dist.flow.run import Run, with_policy
from qe_dist.flow.serving import check_serving
from qe_dist.flow.source import rewritten
from qe_dist.flow.stage import Stage
from qe_dist.flow.tuning import check_tuning, tunable_from
from qe_dist.io.run_dir import RunDir
from qe_dist.io.spool import Spooled
from qe_dist.io.weights import upper_bytes
from qe_dist.methods import AXES
from qe_dist.model import open_model

log = logging.getLogger("qe_dist")


def quantize(*configs: RunConfig) -> None:
    """Quantizes `model` into `output`; continues where an earlier, interrupted call stopped.

    Several runs may differ in recipe and output: one pass of the calibration serves them all.
    """
    capacities = local_capacities(configs[0])
    ready = prepare_run(*configs, capacities=capacities)
    for note in ready.notes:
        log.warning("%s", note)
    with opened(ready) as (ready, lease), closing(Embedder(ready.config, ready.model.arch)) as embedder:
        start(ready)
        while (first := ready.next_block()) is not None:
            wave = plan_wave(ready.task, capacities, first)
            with ExitStack() as open_stages:
                stages = [open_stages.enter_context(closing(Stage(ready.configs, ready.model.arch))) for _ in wave]
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
                        ready.drop_spent(first, block.index)
                        lease.sync()
            ready.store.drop_batches_before(first)
        finish(ready, lease)


@dataclass(frozen=True)
class Prepared:
    """Runs that can begin: nothing is computed or written yet."""

    first: Run
    """The run in whose directory activations are spooled."""
    runs: tuple[Run, ...]
    """They share one pass of the calibration and differ in their recipe."""
    calibration: Calibration
    source: WeightSource
    model: ModelSpec
    notes: tuple[str, ...] = ()
    """What of model and samples is left out or changed, and what a recipe costs beyond its name, a line each."""

    @property
    def samples(self) -> list[list[Sample]]:
        """The batches of calibration samples."""
        return self.calibration.batches

    @property
    def configs(self) -> tuple[RunConfig, ...]:
        """What workers are given, which know the directories by their paths."""
        return tuple(run.config for run in self.runs)

    @property
    def config(self) -> RunConfig:
        """What the first run is asked for. The others differ in recipe and output alone."""
        return self.first.config

    @cached_property
    def task(self) -> Task:
        return Task(self.model, self.configs, self.calibration.tokens, sum(map(len, self.samples)))

    @property
    def store(self) -> RunDir:
        return self.first.store

    def is_finished(self, block: int) -> bool:
        """Whether every run has this block."""
        return all(run.store.has_block(block) for run in self.runs)

    def next_block(self) -> int | None:
        """Where the next wave begins: the last block in front of all that is unfinished whose input is spooled."""
        for run in self.runs:
            run.store.refresh()
        unfinished = next((b.index for b in self.model.blocks if not self.is_finished(b.index)), None)
        if unfinished is None:
            return None
        return min([self.store.last_spooled(unfinished, len(self.samples)), *self._tunable()])

    def _tunable(self) -> Iterator[int]:
        """For each run that tunes and is not finished, the block from which on it can go on."""
        for run in (run for run in self.runs if run.recipe.tuning is not None):
            left = [b.index for b in self.model.blocks if not run.store.has_block(b.index)]
            if left:
                yield tunable_from(run.store, self.store, left[0], len(self.samples))

    def drop_spent(self, first: int, block: int) -> None:
        """Removes full-precision inputs that tuning has left behind up to a finished block, but for those of the first
        block of the wave, from which it is streamed again if a worker is lost."""
        if self.is_finished(block):
            self.store.drop_batches_before(block + 1, after=first)

    def entering(self, block: int, index: int) -> Spooled | None:
        """Batch `index` as it enters a block, or None for one that is to be embedded. Beyond block 0 nobody could make
        one that is not there (removed as damaged a moment ago, or not seen yet on NFS): who reads it says so."""
        return Spooled(block, index) if block > 0 or self.store.has_batch(block, index) else None

    def block_after(self, wave: Wave) -> int | None:
        """The block whose input a wave leaves behind; None after the last one."""
        following = wave[-1].blocks[-1].index + 1
        return following if following < len(self.model.blocks) else None


def prepare_run(*configs: RunConfig, capacities: Sequence[WorkerCapacity] = ()) -> Prepared:
    """Reads samples and headers, and checks what can be checked now. Writes nothing.

    capacities: the workers, where they are known before the work begins.
    """
    stores = [RunDir(config.output) for config in configs]
    configs = tuple(with_policy(config, store) for config, store in zip(configs, stores, strict=True))
    check_siblings(configs)
    found = open_model(configs[0].model)
    source = rewritten(configs[0], found.source)
    model = found.arch.spec(source)
    for config in configs:
        _check_sight(config, source)
        check_serving(model, config, source.config)
    check_runs(model, configs, upper_bytes(source, model.passthrough))
    calibration = read_calibration(configs[0], found.arch.encoder(source.folder))
    notes = [*found.notes, *(note for config in configs for note in cost_notes(model, config)), *calibration.notes]
    batches = calibration.batches
    for config in configs:
        _check_images(config, batches)
        notes += check_tuning(config, model, sum(map(len, batches)), len(batches) * calibration.tokens)
    identities = [config.identity(calibration.fingerprint) for config in configs]
    runs = tuple(
        Run(config, store, identity, calibration.left_out)
        for config, store, identity in zip(configs, stores, identities, strict=True)
    )
    ready = Prepared(runs[0], runs, calibration, source, model, tuple(notes))
    if capacities:
        make_plan(ready.task, capacities)
    return ready


class RunLease:
    """What a call holds: its output directories against other commands, and their copies behind URLs."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs, self.mirrors = runs, [run.mirror for run in runs if run.mirror is not None]

    def check(self) -> None:
        """QEError where another command took a directory over."""
        for run in self.runs:
            run.lock.check()

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
        for run in ready.runs:
            held.enter_context(run.lock)
        for run in ready.runs:
            if run.mirror is not None:
                held.enter_context(run.mirror)
            run.open()
        lease = RunLease(ready.runs)
        lease.sync()
        left = tuple(run for run in ready.runs if not run.store.is_complete)
        yield replace(ready, first=(*left, ready.first)[0], runs=left), lease


def _check_sight(run: RunConfig, source: WeightSource) -> None:
    """Refuses a recipe for images where the model sees none."""
    if run.recipe.needs().images and not archs.for_config(source.config).has_vision(source.config):
        raise ConfigError(f"{run.model} is a model of text only, but {_for_images(run)} are made for images")


def _check_images(run: RunConfig, batches: list[list[Sample]]) -> None:
    """Refuses a recipe for images where there are none."""
    if not run.recipe.needs().images:
        return
    below = held_out_below(sum(map(len, batches)))
    ids = torch.tensor([s.index for batch in batches for s in batch if s.images], dtype=torch.int64)
    if not (sample_keys(ids) >= below).any():
        found = "images only in samples that are held out to measure on" if len(ids) else "no image"
        raise ConfigError(
            f"{run.calibration} has {found}, but {_for_images(run)} must see some; add samples with images"
        )


def _for_images(run: RunConfig) -> str:
    """The parts of a recipe that need images."""
    described = run.recipe.describe()
    return " and ".join(f"{a} {described[a]['name']}" for a in AXES if getattr(run.recipe, a).needs().images)


def start(ready: Prepared) -> None:
    """Writes what is taken over unchanged."""
    for run in ready.runs:
        run.start(ready.model, ready.source)


def finish(ready: Prepared, lease: RunLease) -> None:
    """Everything is fitted: puts the checkpoints together."""
    lease.flush()
    for run in ready.runs:
        run.finish(ready.model, ready.source)
    lease.sync()
