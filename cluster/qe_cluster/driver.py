"""`qe_dist/flow/local.py` on ObjectRefs: the same calls, the same bytes, several blocks at once.

Batches flow through the chain of stage actors as references (stage k takes batch i + 1 while stage k + 1
takes batch i); weights and statistics never move. An actor runs its calls in the order they were made, so
its fits see all its batches.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from qe_cluster.actors import EmbedActor, StageActor
from qe_cluster.launch import ray_cluster
from qe_dist.core.errors import ConfigError, QEError
from qe_dist.core.sample import Sample
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import Prepared, finish, prepare_run, start
from qe_dist.flow.plan import Plan, StagePlan
from qe_dist.io.checkpoint import read_manifest
from qe_dist.io.run_dir import RunDir

IN_FLIGHT_PER_STAGE = 2
Listener = Callable[[str, dict[str, Any]], None]


@dataclass
class Summary:
    seconds: float
    stages: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    bits_per_weight: float = 0.0
    fallbacks: dict[str, list[str]] = field(default_factory=dict)
    continued: int = 0
    """Blocks that an earlier call had finished."""


def quantize(*runs: RunConfig, address: str | None = None, listen: Listener = lambda *_: None) -> Summary:
    """Quantizes on a Ray cluster; see `flow.local.quantize` for what, this file for how. The summary's sizes and
    fall-backs are those of the first run."""
    begin, run = time.perf_counter(), runs[0]
    ready = prepare_run(*runs)
    store, blocks = RunDir(run.output), ready.plan.model.blocks
    summary = Summary(0.0, continued=sum(store.has_block(b.index) for b in blocks))
    if ready.runs:
        start(ready)
        if ready.plan.waves:
            with ray_cluster(address, run.workers * run.threads):
                _check_resources(run)
                _run_waves(ready, listen, summary)
        finish(ready)
    manifest = read_manifest(run.output)
    summary.bits_per_weight, summary.fallbacks = manifest["bits_per_weight"], manifest["fallbacks"]
    summary.seconds = time.perf_counter() - begin
    return summary


def _check_resources(run: RunConfig) -> None:
    """Ray would wait for ever for what the cluster does not have."""
    have = ray.cluster_resources()
    need = {"CPU": run.workers * run.threads, "GPU": 0 if run.device == "cpu" else run.workers}
    for kind, count in need.items():
        if have.get(kind, 0) < count:
            raise ConfigError(f"{run.workers} workers need {count} {kind}s, the cluster has {have.get(kind, 0):g}")


def _run_waves(ready: Prepared, listen: Listener, summary: Summary) -> None:
    plan, samples = ready.plan, ready.samples
    first = plan.waves[0][0].blocks[0].index
    counts = {"batches": len(samples), "blocks": len(plan.model.blocks), "done": first, "waves": len(plan.waves)}
    listen("start", counts)
    actors: list[Any] = []
    try:
        embedder = _embedder(ready.runs[0], plan, samples)
        actors.append(embedder)
        for wave in plan.waves:
            stages = [_stage(ready.runs, plan.model.arch, part) for part in wave]
            actors += stages
            ray.get([stage.load.remote() for stage in stages])
            summary.tokens = _stream(embedder, stages, wave, samples, wave is plan.waves[-1], listen)
            _fit(stages, wave, listen)
            summary.stages += ray.get([s.usage.remote() for s in stages])
            for stage in stages:
                ray.kill(stage)
    except RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        raise cause from (None if isinstance(cause, QEError) else error)
    except RayError as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        if getattr(error, "actor_init_failed", False):
            raise QEError(f"a worker could not start: {said[-1]}; is qe_dist installed on every node?") from None
        raise QEError(
            f"a worker died: {said[0]}; finished blocks are safe, type the same command again to continue"
        ) from None
    finally:
        for actor in actors:
            ray.kill(actor)


def _stage(runs: Sequence[RunConfig], arch: str, part: StagePlan) -> Any:
    gpus = 0 if runs[0].device == "cpu" else 1
    return StageActor.options(num_cpus=runs[0].threads, num_gpus=gpus).remote(runs, arch, part)


def _embedder(run: RunConfig, plan: Plan, samples: list[list[Sample]]) -> Any:
    """On CPU it feeds the stages as they go. A GPU is lent to it first, and then given to a stage: the
    second embedder finds every batch in the spool."""
    arch = plan.model.arch
    if run.device != "cpu" and plan.waves[0][0].blocks[0].index == 0:
        first = EmbedActor.options(num_cpus=0, num_gpus=1).remote(run, arch)
        ray.get([first.spool.remote(i, part) for i, part in enumerate(samples)])
        ray.kill(first)
    return EmbedActor.options(num_cpus=0).remote(run, arch)


def _stream(
    embedder: Any,
    stages: list[Any],
    wave: Sequence[StagePlan],
    samples: list[list[Sample]],
    last: bool,
    listen: Listener,
) -> int:
    """Sends every batch through the stages of a wave, a bounded number at a time. Returns the tokens seen."""
    first_block, next_block = wave[0].blocks[0].index, wave[-1].blocks[-1].index + 1
    flight: deque[Any] = deque()
    tokens = 0

    def land() -> int:
        count = ray.get(flight.popleft())
        listen("batch", {"tokens": count})
        return count

    for index, part in enumerate(samples):
        if len(flight) >= IN_FLIGHT_PER_STAGE * len(stages):
            tokens += land()
        batch = embedder.input_of.remote(first_block, index, part)
        for stage in stages[:-1]:
            batch = stage.forward.remote(batch)
        flight.append(stages[-1].finish.remote(batch, None if last else next_block))
    while flight:
        tokens += land()
    return tokens


def _fit(stages: list[Any], wave: Sequence[StagePlan], listen: Listener) -> None:
    """All stages fit their blocks at the same time; each block is published as it finishes."""
    waiting = {
        stage.fit.remote(block.index): block.index
        for stage, part in zip(stages, wave, strict=True)
        for block in part.blocks
    }
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1)
        del waiting[done[0]]
        listen("block", ray.get(done[0]))
