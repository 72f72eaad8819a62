"""Who does which blocks, in which wave, and whether it can work at all. Pure, before the first byte of work."""

import shutil
from dataclasses import dataclass, replace

import psutil

from qe_dist.core.errors import ConfigError
from qe_dist.core.spec import BlockSpec, ModelSpec, per_linear
from qe_dist.flow.config import RunConfig
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
    output_bytes: int

    @property
    def stages(self) -> tuple[StagePlan, ...]:
        return tuple(stage for wave in self.waves for stage in wave)


def make_plan(
    model: ModelSpec,
    run: RunConfig,
    passthrough_bytes: int = 0,
    first_block: int = 0,
    memory: int | None = None,
) -> Plan:
    """Cuts the blocks from `first_block` on into waves of at most `workers` stages. Refuses what would fail later.

    memory: bytes that all workers together may use; default 80 % of what this machine has free.
    """
    if run.recipe.granularity == "linear":
        model = replace(model, blocks=tuple(per_linear(b) for b in model.blocks))
    _check_scheme(model, run)
    memory = memory or int(0.8 * psutil.virtual_memory().available)
    need = max(block_bytes(b, run) for b in model.blocks)
    fitting = memory // run.workers // need
    if fitting == 0 and run.device == "cpu":
        raise ConfigError(
            f"one block needs {need / 2**30:.1f} GiB (weights, statistics, fit), but {run.workers} workers have "
            f"{memory / run.workers / 2**30:.1f} GiB each; use fewer workers or a machine with more memory"
        )
    each = run.blocks_per_worker or max(1, min(-(-(len(model.blocks) - first_block) // run.workers), fitting))
    output = _output_bytes(model, run) + passthrough_bytes
    _check_disk(run, output)
    return Plan(model, _waves(model.blocks[first_block:], run.workers, each), output)


def _waves(blocks: tuple[BlockSpec, ...], workers: int, each: int) -> tuple[tuple[StagePlan, ...], ...]:
    waves = []
    for start in range(0, len(blocks), workers * each):
        part = blocks[start : start + workers * each]
        stages = [part[i : i + each] for i in range(0, len(part), each)]
        waves.append(tuple(StagePlan(w, stage) for w, stage in enumerate(stages)))
    return tuple(waves)


def block_bytes(block: BlockSpec, run: RunConfig) -> int:
    """Memory that a worker needs per block while it gathers and fits: weights twice, Grams, token samples."""
    weights = 2 * STATE_BYTES * block.num_weights
    widths = [g.in_features for g in block.groups]
    grams = STATE_BYTES * (M + 2) * sum(w * w for w in widths) if run.recipe.needs().gram else 0
    samples = STATE_BYTES * 2 * run.sample_tokens * 2 * sum(widths)
    return weights + grams + samples


def _output_bytes(model: ModelSpec, run: RunConfig) -> int:
    """Upper bound of the quantized blocks: codes, and what the budget allows for the repair."""
    scheme, budget = run.recipe.scheme, run.recipe.budget
    total = 0
    for block in model.blocks:
        for group in block.groups:
            outputs = sum(x.out_features for x in group.linears)
            total += outputs * group.in_features * (scheme.weight_bits + 1) // 8
            experts = 1 + getattr(run.recipe.compensation, "num_experts", 0)
            rank = budget.rank or group.in_features
            total += 2 * experts * min(rank, group.in_features) * (outputs + group.in_features)
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
