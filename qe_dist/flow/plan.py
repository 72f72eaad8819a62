"""Who does which blocks, in which wave, and whether it can work at all. Pure, before the first byte of work."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import psutil
import torch

from qe_dist.core.batch import held_out_below
from qe_dist.core.errors import ConfigError
from qe_dist.core.spec import BlockSpec, InputGroup, ModelSpec
from qe_dist.flow.config import RunConfig, needs_of
from qe_dist.methods.base import Bounded, Shares
from qe_dist.methods.footprint import Footprint, footprint
from qe_dist.numerics.factors import row_scale_bits
from qe_dist.numerics.stats import M, held_out_size

FREE_SHARE = 0.8  # of what is free; the rest is for Python, activations, and whoever else is there
MOVED = 1.2  # what a fit costs elsewhere, with the way there


@dataclass(frozen=True)
class WorkerCapacity:
    """What one worker offers."""

    memory: int
    """Bytes for blocks: weights, statistics, fit."""
    speed: float = 1.0
    """Relative to other workers; only ratios count."""
    node: str = "this machine"
    host_memory: int = 0
    """Bytes for Gram matrices beside a device that has no room for them."""


@dataclass(frozen=True)
class StagePlan:
    """Consecutive blocks for one worker."""

    worker: int
    blocks: tuple[BlockSpec, ...]
    grams_on_host: bool = False
    held_out_below: int = 0
    """Sequences whose keys are below this one are held out of the statistics."""


Wave = tuple[StagePlan, ...]


@dataclass(frozen=True)
class Task:
    """What is to be done, as far as plans ask."""

    model: ModelSpec
    runs: tuple[RunConfig, ...]
    """All that are served by one pass of the calibration (see `flow.local.quantize`)."""
    batch_tokens: int
    """Of the largest batch, padding included."""
    num_samples: int

    @cached_property
    def held_out_below(self) -> int:
        return held_out_below(self.num_samples)

    @property
    def sampled_tokens(self) -> int:
        """That a group keeps at most, held-out ones included."""
        size = self.runs[0].sample_tokens
        return size + (held_out_size(size) if self.held_out_below else 0)

    def footprint(self, block: BlockSpec) -> Footprint:
        run = self.runs[0]
        recipes = [run.recipe_for(block.index) for run in self.runs]
        return footprint(block, recipes, self.sampled_tokens, self.batch_tokens, run.dtype.itemsize)


def make_plan(task: Task, capacities: Sequence[WorkerCapacity], first_block: int = 0) -> tuple[Wave, ...]:
    """All waves from `first_block` on, if nobody comes or goes."""
    waves: list[Wave] = []
    while first_block < len(task.model.blocks):
        waves.append(plan_wave(task, capacities, first_block))
        first_block = waves[-1][-1].blocks[-1].index + 1
    return tuple(waves)


def plan_wave(task: Task, capacities: Sequence[WorkerCapacity], first_block: int) -> Wave:
    """The next blocks, cut into a stage for every worker: as many as fit, by speed, in waves of equal size."""
    left = task.model.blocks[first_block:]
    needs = [task.footprint(block) for block in left]
    kept, passing = max(n.kept for n in needs), max(n.passing for n in needs)
    grams, widest = max(n.grams for n in needs), max(n.widest_gram for n in needs)
    at_most = task.runs[0].blocks_per_worker or len(left)
    room = [min(max(0, capacity.memory - passing) // kept, at_most) for capacity in capacities]
    on_host = not sum(room) and grams > 0
    if on_host:
        here = [max(0, capacity.memory - passing - widest) // (kept - grams) for capacity in capacities]
        room = [min(n, capacity.host_memory // grams, at_most) for n, capacity in zip(here, capacities, strict=True)]
    if not sum(room):
        largest = max(capacities, key=lambda capacity: capacity.memory)
        raise ConfigError(
            f"one block needs {_gib(kept + passing)}: {_gib(kept)} for weights and statistics, {_gib(passing)} while a "
            f"batch goes through or a fit is made; but of {len(capacities)} workers the largest, on {largest.node}, "
            f"has {_gib(largest.memory)}. Use fewer workers, --memory, fewer --samples-per-batch, or a larger machine"
        )
    waves = -(-len(left) // sum(room))
    counts = share_out(-(-len(left) // waves), room, [capacity.speed for capacity in capacities])
    ends = list(accumulate(counts))
    return tuple(
        StagePlan(worker, left[end - count : end], on_host, task.held_out_below)
        for worker, (count, end) in enumerate(zip(counts, ends, strict=True))
        if count
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def share_out(count: int, room: Sequence[int], speeds: Sequence[float]) -> list[int]:
    """Gives `count` equal blocks to workers so that the slowest is done soonest; none gets more than has room."""
    shares = [0] * len(room)
    for _ in range(min(count, sum(room))):
        free = [i for i, most in enumerate(room) if shares[i] < most]
        shares[min(free, key=lambda i: ((shares[i] + 1) / speeds[i], i))] += 1
    return shares


@dataclass(frozen=True)
class FitJob:
    """One input group of one block for one run."""

    run: int
    block: int
    group: str


def balance(
    costs: Mapping[FitJob, float],
    owners: Mapping[FitJob, int],
    speeds: Sequence[float],
    stay: Collection[FitJob] = (),
) -> dict[FitJob, int]:
    """Which worker fits what. A job leaves its owner, who has the weights and statistics, only for one who is done
    with it before the owner would be: longest first, each to who finishes it first.

    stay: jobs that are too large to travel.
    """
    busy = [0.0] * len(speeds)
    for job, owner in owners.items():
        busy[owner] += costs[job] / speeds[owner]
    placed = dict(owners)
    for job in sorted(costs.keys() - set(stay), key=lambda j: (-costs[j], j.block, j.run, j.group)):
        owner = owners[job]
        other = min(range(len(speeds)), key=lambda w: (busy[w] + costs[job] / speeds[w], w))
        if busy[other] + MOVED * costs[job] / speeds[other] < busy[owner]:
            busy[owner] -= costs[job] / speeds[owner]
            busy[other] += MOVED * costs[job] / speeds[other]
            placed[job] = other
    return placed


def fit_cost(group: InputGroup) -> float:
    """Multiplications of a fit, roughly: factorizing the Gram matrix, and a few products of weights with it."""
    width, outputs = group.in_features, sum(x.out_features for x in group.linears)
    return float(width) ** 3 + 4.0 * outputs * width**2


def check_runs(model: ModelSpec, runs: Sequence[RunConfig], passthrough_bytes: int) -> None:
    """Refuses what would fail later, whatever the workers."""
    for run in runs:
        if run.from_block >= len(model.blocks):
            raise ConfigError(f"from_block is {run.from_block}, but the model ends with block {len(model.blocks) - 1}")
        _check_scheme(model, run)
        _check_budget(model, run)
        written = sum(f.stat().st_size for f in run.output.rglob("*.safetensors")) if run.output.exists() else 0
        _check_disk(run, passthrough_bytes + _output_bytes(model.blocks, run) - written)


def local_capacities(run: RunConfig) -> list[WorkerCapacity]:
    """The workers that this machine alone can offer: 80 % of its free memory among them, or a GPU for each."""
    workers = run.workers or 1
    if run.device == "cuda" and torch.cuda.is_available():
        host = run.host_memory or int(FREE_SHARE * psutil.virtual_memory().available) // workers
        return [
            WorkerCapacity(run.memory or int(FREE_SHARE * torch.cuda.mem_get_info()[0]), host_memory=host)
        ] * workers
    return [WorkerCapacity(run.memory or int(FREE_SHARE * psutil.virtual_memory().available) // workers)] * workers


def travel_bytes(group: InputGroup, task: Task, block: int) -> int:
    """What goes to another worker that fits a group: weights, Gram matrices, token sample, in float32."""
    width, outputs = group.in_features, sum(x.out_features for x in group.linears)
    gram = M * width * width if needs_of(task.runs, block).gram else 0
    return 4 * (width * outputs + gram + 2 * task.sampled_tokens * width)


def _output_bytes(blocks: tuple[BlockSpec, ...], run: RunConfig) -> int:
    """Upper bound of these quantized blocks: codes, and what the budget allows for the repair."""
    total = 0
    for block in blocks:
        recipe = run.recipe_for(block.index)
        view = recipe.view(block)
        for group in view.groups:
            width, outputs = group.in_features, sum(x.out_features for x in group.linears)
            total += outputs * width * (recipe.scheme.weight_bits + 1) // 8
            total += recipe.compensation.most_bytes(outputs, width, view.router_width(group), recipe.budget)
            if recipe.budget.extra_bits is None:  # else the budget includes them
                total += int(recipe.list_bits * outputs * width / 8)
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
            if isinstance(run.recipe.quantizer, Bounded):
                run.recipe.quantizer.check_layer(f"{block.prefix}{group.name}", group.in_features)


def _check_budget(model: ModelSpec, run: RunConfig) -> None:
    """A byte budget that the scales of an adapter's rows use up buys nothing."""
    budget, block = run.recipe.budget, model.blocks[0]
    if budget.extra_bits is None or not isinstance(run.recipe.compensation, Shares):
        return
    scale_bits = row_scale_bits(budget.factor_bits)
    scales = scale_bits * sum(x.out_features for g in block.groups for x in g.linears) / block.num_weights
    lists = run.recipe.list_bits
    if budget.extra_bits - lists < scales:
        after = f" after lists of channels that take {lists:g}" if lists else ""
        raise ConfigError(
            f"a budget of {budget.extra_bits:g} bits per weight buys nothing{after}: the scales of an adapter's rows "
            f"alone take {scales:.3f} in {block.prefix}; give more, or choose budget.factor_bits = 16"
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
