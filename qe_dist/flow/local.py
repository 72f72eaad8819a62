"""The whole pipeline in one process: the specification of what the Ray driver does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qe_dist import archs
from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import Sample
from qe_dist.core.source import WeightSource
from qe_dist.flow.calibrate import Embedder, make_batches
from qe_dist.flow.config import RunConfig, check_siblings
from qe_dist.flow.plan import Plan, make_plan
from qe_dist.flow.source import open_source
from qe_dist.flow.stage import Stage
from qe_dist.io.checkpoint import assemble, put_passthrough
from qe_dist.io.run_dir import RunDir
from qe_dist.io.weights import upper_bytes
from qe_dist.methods import AXES


@dataclass(frozen=True)
class Prepared:
    """Runs that can begin: nothing is computed yet."""

    runs: tuple[RunConfig, ...]
    """Those that are not finished; they share one pass of the calibration and differ in their recipe."""
    samples: list[list[Sample]]
    source: WeightSource
    plan: Plan
    identities: Mapping[RunConfig, Mapping[str, Any]]


def prepare_run(*runs: RunConfig) -> Prepared:
    """Reads samples and headers, makes the plan, claims the output directories."""
    check_siblings(runs)
    samples = make_batches(runs[0])
    source = open_source(runs[0])
    model = archs.for_config(source.config).spec(source)
    for run in runs:
        _check_images(run, samples, source)
    images = [image for batch in samples for sample in batch for image in sample.images]
    left = tuple(run for run in runs if not RunDir(run.output).is_complete)
    for run in left:
        RunDir(run.output).check_files()
    first = _first_block(left, len(model.blocks), len(samples))
    plan = make_plan(model, left or runs, upper_bytes(source, model.passthrough), first)
    identities = {run: run.identity(images) for run in runs}
    for run, identity in identities.items():
        store = RunDir(run.output)
        store.open(identity, run.resume)
        if run not in left:
            store.clean()
    return Prepared(left, samples, source, plan, identities)


def _first_block(left: Sequence[RunConfig], num_blocks: int, num_batches: int) -> int:
    """Where to continue; activations are spooled in the directory of the first run."""
    unfinished = min((RunDir(run.output).first_unfinished(num_blocks) for run in left), default=num_blocks)
    return num_blocks if unfinished == num_blocks else RunDir(left[0].output).last_spooled(unfinished, num_batches)


def _check_images(run: RunConfig, samples: list[list[Sample]], source: WeightSource) -> None:
    """Refuses a recipe for images where there are none."""
    if not run.recipe.needs().images:
        return
    described = run.recipe.describe()
    names = " and ".join(f"{a} {described[a]['name']}" for a in AXES if getattr(run.recipe, a).needs().images)
    if "vision_config" not in source.config:
        raise ConfigError(f"{run.model} is a model of text only, but {names} are made for images")
    if not any(sample.images for batch in samples for sample in batch):
        raise ConfigError(f"{run.calibration} has no image, but {names} must see some; add samples with images")


def quantize(*runs: RunConfig) -> None:
    """Quantizes `run.model` into `run.output`; continues where an earlier, interrupted call stopped.

    Several runs may differ in recipe and output: one pass of the calibration serves them all.
    """
    ready = prepare_run(*runs)
    if not ready.runs:
        return
    plan, arch = ready.plan, ready.plan.model.arch
    start(ready)
    embedder = Embedder(ready.runs[0], arch)
    for wave in plan.waves:
        stages = [Stage(ready.runs, arch, part) for part in wave]
        for stage in stages:
            stage.load()
        for i, part in enumerate(ready.samples):
            batch = embedder.input_of(wave[0].blocks[0].index, i, part)
            for stage in stages[:-1]:
                batch = stage.forward(batch)
            stages[-1].finish(batch, None if wave is plan.waves[-1] else wave[-1].blocks[-1].index + 1)
        for stage, part in zip(stages, wave, strict=True):
            for block in part.blocks:
                stage.fit(block.index)
    finish(ready)


def start(ready: Prepared) -> None:
    """Writes what is taken over unchanged."""
    for run in ready.runs:
        put_passthrough(RunDir(run.output), ready.plan.model, ready.source)


def finish(ready: Prepared) -> None:
    """Everything is fitted: put the checkpoints together and drop what only a continuation would need."""
    for run in ready.runs:
        store = RunDir(run.output)
        assemble(store, ready.plan.model, ready.source, run.recipe.describe(), ready.identities[run])
        store.clean()
