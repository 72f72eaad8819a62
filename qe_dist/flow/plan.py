"""Who does which blocks, in which wave, and whether it can work at all. Pure, before the first byte of work."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from qe_dist.core.errors import ConfigError
from qe_dist.core.spec import BlockSpec, ModelSpec
from qe_dist.flow.config import RunConfig, needs_of
from qe_dist.methods.base import Shares
from qe_dist.numerics.lowrank import capped
from qe_dist.numerics.stats import M

STATE_BYTES = 4  # statistics and fits are float32


@dataclass(frozen=True)
class StagePlan:
    """Consecutive blocks for one worker."""

    worker: int
    blocks: tuple[BlockSpec, ...]


@dataclass(frozen=True)
class Plan:
    model: ModelSpec
    waves: tuple[tuple[StagePlan, ...], ...]

    @property
    def stages(self) -> tuple[StagePlan, ...]:
        return tuple(stage for wave in self.waves for stage in wave)


def make_plan(
    model: ModelSpec,
    runs: Sequence[RunConfig],
    passthrough_bytes: int = 0,
    first_block: int = 0,
    memory: int | None = None,
) -> Plan:
    """Cuts the blocks from `first_block` on into waves of at most `workers` stages. Refuses what would fail later.

    runs: all that are served by one pass of the calibration (see `flow.local.quantize`).
    memory: bytes that all workers together may use; default 80 % of what this machine, or on CUDA its first GPU
    for each worker, has free.
    """
    run = runs[0]
    for each in runs:
        _check_scheme(model, each)
        _check_budget(model, each)
    memory = memory or int(0.8 * _free_memory(run))
    need = max(block_bytes(b, runs) for b in model.blocks)
    fitting = memory // run.workers // need
    if fitting == 0:
        raise ConfigError(
            f"one block needs {need / 2**30:.1f} GiB (weights, statistics, fit), but {run.workers} workers have "
            f"{memory / run.workers / 2**30:.1f} GiB each; use fewer workers or a machine with more memory"
        )
    each = run.blocks_per_worker or max(1, min(-(-(len(model.blocks) - first_block) // run.workers), fitting))
    left = model.blocks[first_block:]
    passed_on = len(runs) * passthrough_bytes if first_block == 0 else 0
    _check_disk(run, sum(_output_bytes(left, each) for each in runs) + passed_on)
    return Plan(model, _waves(left, run.workers, each))


def _waves(blocks: tuple[BlockSpec, ...], workers: int, each: int) -> tuple[tuple[StagePlan, ...], ...]:
    waves = []
    for start in range(0, len(blocks), workers * each):
        part = blocks[start : start + workers * each]
        stages = [part[i : i + each] for i in range(0, len(part), each)]
        waves.append(tuple(StagePlan(w, stage) for w, stage in enumerate(stages)))
    return tuple(waves)


def block_bytes(block: BlockSpec, runs: Sequence[RunConfig]) -> int:
    """Memory that a worker needs per block while it gathers and fits: weights twice, Grams, token samples."""
    run = runs[0]
    weights = 2 * STATE_BYTES * block.num_weights
    widths = [g.in_features for g in block.groups]
    grams = STATE_BYTES * (M + 2) * sum(w * w for w in widths) if needs_of(runs).gram else 0
    samples = STATE_BYTES * 2 * run.sample_tokens * 2 * sum(widths)
    return weights + grams + samples


def _free_memory(run: RunConfig) -> int:
    if run.device == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] * run.workers
    return psutil.virtual_memory().available


def _output_bytes(blocks: tuple[BlockSpec, ...], run: RunConfig) -> int:
    """Upper bound of these quantized blocks: codes, and what the budget allows for the repair."""
    scheme, budget = run.recipe.scheme, run.recipe.budget
    experts = 1 + getattr(run.recipe.compensation, "num_experts", 0)
    channels = getattr(run.recipe.compensation, "k", 0)
    total = 0
    for block in blocks:
        for group in block.groups:
            width, outputs = group.in_features, sum(x.out_features for x in group.linears)
            total += outputs * width * (scheme.weight_bits + 1) // 8
            if budget.rank is None:
                total += int((budget.extra_bits or 0) * outputs * width / 8)
            else:
                repair = capped(width, budget.rank) * (outputs + width) + capped(width, channels) * outputs
                total += 2 * experts * repair
    return total


def _check_scheme(model: ModelSpec, run: RunConfig) -> None:
    size = run.recipe.scheme.group_size
    for block in model.blocks[:1]:
        for group in block.groups:
            if size is not None and group.in_features % size:
                raise ConfigError(
                    f"group size {size} does not divide the {group.in_features} inputs of "
                    f"{block.prefix}{group.name}; choose one that does, or none (per output channel)"
                )


def _check_budget(model: ModelSpec, run: RunConfig) -> None:
    """A byte budget that the scales of an adapter's rows use up buys nothing."""
    budget, block = run.recipe.budget, model.blocks[0]
    if budget.extra_bits is None or budget.factor_bits == 16 or not isinstance(run.recipe.compensation, Shares):
        return
    scales = 16 * sum(x.out_features for g in block.groups for x in g.linears) / block.num_weights
    if budget.extra_bits < scales:
        raise ConfigError(
            f"a budget of {budget.extra_bits:g} bits per weight buys nothing: the scales of an adapter's rows alone "
            f"take {scales:.3f} in {block.prefix}; give more, or choose budget.factor_bits = 16"
        )


def _check_disk(run: RunConfig, output_bytes: int) -> None:
    place = run.output
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < output_bytes:
        raise ConfigError(
            f"{place} has {free / 2**20:.0f} MiB free, the checkpoint needs about {output_bytes / 2**20:.0f} MiB; "
            "free some space or choose another output directory"
        )
