"""The whole pipeline in one process: the specification of what the Ray driver does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qe_dist import archs
from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import Sample
from qe_dist.flow.calibrate import Embedder, make_batches
from qe_dist.flow.config import RunConfig
from qe_dist.flow.plan import Plan, make_plan
from qe_dist.flow.stage import Stage
from qe_dist.io.checkpoint import assemble, put_passthrough
from qe_dist.io.run_dir import RunDir
from qe_dist.io.weights import SafetensorsSource
from qe_dist.methods import AXES


@dataclass(frozen=True)
class Prepared:
    """A run that can begin: nothing is computed yet."""

    samples: list[list[Sample]]
    source: SafetensorsSource
    plan: Plan
    store: RunDir
    identity: Mapping[str, Any]


def prepare_run(run: RunConfig) -> Prepared:
    """Reads samples and headers, makes the plan, claims the output directory."""
    samples = make_batches(run)
    source = SafetensorsSource(run.model)
    model = archs.for_config(source.config).spec(source)
    _check_images(run, samples, source)
    store = RunDir(run.output)
    first = store.first_block_to_run(len(model.blocks), len(samples))
    plan = make_plan(model, run, source.bytes(model.passthrough), first)
    identity = run.identity(image for batch in samples for sample in batch for image in sample.images)
    store.open(identity, run.resume)
    return Prepared(samples, source, plan, store, identity)


def _check_images(run: RunConfig, samples: list[list[Sample]], source: SafetensorsSource) -> None:
    """Refuses a recipe for images where there are none."""
    if not run.recipe.needs().images:
        return
    described = run.recipe.describe()
    names = " and ".join(f"{a} {described[a]['name']}" for a in AXES if getattr(run.recipe, a).needs().images)
    if "vision_config" not in source.config:
        raise ConfigError(f"{run.model} is a model of text only, but {names} are made for images")
    if not any(sample.images for batch in samples for sample in batch):
        raise ConfigError(f"{run.calibration} has no image, but {names} must see some; add samples with images")


def quantize(run: RunConfig) -> None:
    """Quantizes `run.model` into `run.output`; continues where an earlier, interrupted call stopped."""
    ready = prepare_run(run)
    plan, store = ready.plan, ready.store
    if store.is_complete:
        return
    put_passthrough(store, plan.model, ready.source)
    embedder = Embedder(run, plan.model.arch)
    for wave in plan.waves:
        stages = [Stage(run, plan.model.arch, part) for part in wave]
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
    finish(run, ready)


def finish(run: RunConfig, ready: Prepared) -> None:
    """Everything is fitted: put the checkpoint together and drop what only a continuation would need."""
    assemble(ready.store, ready.plan.model, ready.source, run.recipe.describe(), ready.identity)
    ready.store.clean()
