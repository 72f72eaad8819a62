"""The whole pipeline in one process: the specification of what the Ray driver does."""

from qe_dist import archs
from qe_dist.flow.calibrate import Embedder, make_batches
from qe_dist.flow.config import RunConfig
from qe_dist.flow.plan import Plan, make_plan
from qe_dist.flow.stage import Stage
from qe_dist.io.checkpoint import assemble, put_passthrough
from qe_dist.io.run_dir import RunDir
from qe_dist.io.weights import SafetensorsSource


def prepare_run(run: RunConfig, num_batches: int) -> tuple[SafetensorsSource, Plan, RunDir]:
    """Reads headers, makes the plan, claims the output directory. Nothing is computed yet."""
    source = SafetensorsSource(run.model)
    model = archs.for_config(source.config).spec(source)
    store = RunDir(run.output)
    first = store.first_block_to_run(len(model.blocks), num_batches)
    plan = make_plan(model, run, source.bytes(model.passthrough), first)
    store.open(run.identity(), run.resume)
    return source, plan, store


def quantize(run: RunConfig) -> None:
    """Quantizes `run.model` into `run.output`; continues where an earlier, interrupted call stopped."""
    samples = make_batches(run)
    source, plan, store = prepare_run(run, len(samples))
    if store.is_complete:
        return
    put_passthrough(store, plan.model, source)
    embedder = Embedder(run, plan.model.arch)
    for wave in plan.waves:
        stages = [Stage(run, plan.model.arch, part) for part in wave]
        for stage in stages:
            stage.load()
        for i, part in enumerate(samples):
            batch = embedder.input_of(wave[0].blocks[0].index, i, part)
            for stage in stages:
                batch = stage.forward(batch)
            embedder.finish(None if wave is plan.waves[-1] else wave[-1].blocks[-1].index + 1, batch)
        for stage, part in zip(stages, wave, strict=True):
            for block in part.blocks:
                stage.fit(block.index)
    finish(run, plan, store, source)


def finish(run: RunConfig, plan: Plan, store: RunDir, source: SafetensorsSource) -> None:
    """Everything is fitted: put the checkpoint together and drop what only a continuation would need."""
    assemble(store, plan.model, source, run.recipe.describe(), run.identity())
    store.clean()
