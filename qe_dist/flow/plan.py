"""Which worker gets which blocks in which wave, and what is refused before any work begins."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import psutil
import torch

from qe_dist.core.batch import held_out_below
from qe_dist.core.errors import ConfigError, NoRoomError
from qe_dist.core.spec import BlockSpec, ModelSpec
from qe_dist.flow.config import RunConfig
from qe_dist.methods.base import Bounded, Shares
from qe_dist.methods.footprint import Footprint, Sequences, footprint
from qe_dist.numerics.factors import row_scale_bits
from qe_dist.numerics.stats import held_out_size

LARGE_REPAIR = 1.0
"""Bits per weight of a repair that is told before the work."""
FREE_SHARE = 0.8  # of free memory; the rest is for Python, activations and other processes


@dataclass(frozen=True)
class WorkerCapacity:
    """What one worker offers."""

    memory: int
    """Bytes for weights, statistics and fits of blocks."""
    speed: float = 1.0
    """Relative to the other workers."""
    node: str = "this machine"
    host_memory: int = 0
    """Bytes of the host for Gram matrices that do not fit on the device."""


@dataclass(frozen=True)
class StagePlan:
    """Consecutive blocks for one worker."""

    worker: int
    blocks: tuple[BlockSpec, ...]
    grams_on_host: bool = False
    held_out_below: int = 0
    """Sequences whose keys are below this one are held out of the statistics."""
    num_blocks: int = 0
    """Number of blocks of the model."""
    num_batches: int = 0
    """Number of batches of the calibration."""


Wave = tuple[StagePlan, ...]


@dataclass(frozen=True)
class Task:
    """What plans need to know of the work."""

    model: ModelSpec
    runs: tuple[RunConfig, ...]
    """The runs that share one pass of the calibration (see `flow.local.quantize`)."""
    batch_tokens: int
    """Tokens of the largest batch, padding included."""
    num_samples: int

    @property
    def num_batches(self) -> int:
        return -(-self.num_samples // self.runs[0].samples_per_batch)

    @cached_property
    def held_out_below(self) -> int:
        return held_out_below(self.num_samples)

    @property
    def sampled_tokens(self) -> int:
        """Most tokens that a group keeps as its sample, held-out ones included."""
        size = self.runs[0].sample_tokens
        return size + (held_out_size(size) if self.held_out_below else 0)

    def footprint(self, block: BlockSpec) -> Footprint:
        run = self.runs[0]
        recipes = [run.recipe_for(block.index) for run in self.runs]
        longest = -(-self.batch_tokens // min(run.samples_per_batch, self.num_samples))
        calibration = Sequences(self.num_samples, longest)
        return footprint(block, recipes, self.sampled_tokens, self.batch_tokens, run.dtype.itemsize, calibration)


def make_plan(task: Task, capacities: Sequence[WorkerCapacity], first_block: int = 0) -> tuple[Wave, ...]:
    """All waves from `first_block` on, if the workers stay the same. Raises ConfigError as `plan_wave` does."""
    waves: list[Wave] = []
    while first_block < len(task.model.blocks):
        waves.append(plan_wave(task, capacities, first_block))
        first_block = waves[-1][-1].blocks[-1].index + 1
    return tuple(waves)


def plan_wave(task: Task, capacities: Sequence[WorkerCapacity], first_block: int) -> Wave:
    """The blocks of the next wave: as many as fit, shared out by the speed of the workers, in waves of equal size.

    Raises ConfigError when no worker has memory for a block.
    """
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
        StagePlan(
            worker,
            left[end - count : end],
            on_host,
            task.held_out_below,
            len(task.model.blocks),
            task.num_batches,
        )
        for worker, (count, end) in enumerate(zip(counts, ends, strict=True))
        if count
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def share_out(count: int, room: Sequence[int], speeds: Sequence[float]) -> list[int]:
    """Shares `count` equal blocks out so that the last worker is done as early as possible.

    room: the most blocks of each worker. Returns the number of blocks of each.
    """
    shares = [0] * len(room)
    for _ in range(min(count, sum(room))):
        free = [i for i, most in enumerate(room) if shares[i] < most]
        shares[min(free, key=lambda i: ((shares[i] + 1) / speeds[i], i))] += 1
    return shares


@dataclass(frozen=True)
class FitJob:
    """The fit of one input group of one block for one run."""

    run: int
    block: int
    group: str


def check_runs(model: ModelSpec, runs: Sequence[RunConfig], passthrough_bytes: int) -> None:
    """Raises ConfigError for what would fail later with any workers: from_block, scheme, budget, disk space
    (NoRoomError)."""
    for run in runs:
        if run.from_block >= len(model.blocks):
            raise ConfigError(f"from_block is {run.from_block}, but the model ends with block {len(model.blocks) - 1}")
        _check_scheme(model, run)
        _check_budget(model, run)
        written = sum(f.stat().st_size for f in run.output.rglob("*.safetensors")) if run.output.exists() else 0
        _check_disk(run, passthrough_bytes + _output_bytes(model.blocks, run) - written)


def local_capacities(run: RunConfig) -> list[WorkerCapacity]:
    """The workers that this machine alone can offer: each has a GPU, or its part of 80 % of the free memory."""
    workers = run.workers or 1
    if run.device == "cuda" and torch.cuda.is_available():
        host = run.host_memory or int(FREE_SHARE * psutil.virtual_memory().available) // workers
        return [
            WorkerCapacity(run.memory or int(FREE_SHARE * torch.cuda.mem_get_info()[0]), host_memory=host)
        ] * workers
    return [WorkerCapacity(run.memory or int(FREE_SHARE * psutil.virtual_memory().available) // workers)] * workers


def cost_notes(model: ModelSpec, run: RunConfig) -> list[str]:
    """A line where the repair may take more than a bit per weight: a recipe's name tells the codes alone."""
    block = model.blocks[-1]
    recipe = run.recipe_for(block.index)
    repair = 8 * sum(_repair_bytes((block,), run)) / block.num_weights
    if repair <= LARGE_REPAIR:
        return []
    name, codes = recipe.describe()["compensation"]["name"], recipe.scheme.weight_bits
    return [
        f"{run.output}: this recipe stores up to {codes + repair:.2f} bits per quantized weight, {codes} of codes and "
        f"{repair:.2f} of {name}; a byte budget bounds them, as @0.5 behind a recipe's name does"
    ]


def _output_bytes(blocks: tuple[BlockSpec, ...], run: RunConfig) -> int:
    """Upper bound of these quantized blocks: codes with their scales, and what the budget allows for the repair."""
    codes = sum(
        sum(x.out_features for x in group.linears) * group.in_features * (recipe.scheme.weight_bits + 1) // 8
        for block in blocks
        for recipe in [run.recipe_for(block.index)]
        for group in recipe.view(block).groups
    )
    return codes + sum(_repair_bytes(blocks, run))


def _repair_bytes(blocks: tuple[BlockSpec, ...], run: RunConfig) -> Iterator[int]:
    """Upper bound of what is stored beside the codes of each group."""
    for block in blocks:
        recipe = run.recipe_for(block.index)
        view = recipe.view(block)
        for group in view.groups:
            width, outputs = group.in_features, sum(x.out_features for x in group.linears)
            yield recipe.compensation.most_bytes(outputs, width, view.router_width(group), recipe.budget)
            if recipe.budget.extra_bits is None:  # else the budget includes them
                yield int(recipe.list_bits * outputs * width / 8)


def _check_scheme(model: ModelSpec, run: RunConfig) -> None:
    size = run.recipe.scheme.group_size
    for block in model.kinds:
        for group in block.groups:
            if size is not None and group.in_features % size:
                raise ConfigError(
                    f"group size {size} does not divide the {group.in_features} inputs of "
                    f"{block.prefix}{group.name}; choose one that does, or none (per output channel)"
                )
            if isinstance(run.recipe.quantizer, Bounded):
                run.recipe.quantizer.check_layer(f"{block.prefix}{group.name}", group.in_features)


def _check_budget(model: ModelSpec, run: RunConfig) -> None:
    """Raises ConfigError when the scales of the low-rank factors alone use up a byte budget."""
    budget = run.recipe.budget
    if budget.extra_bits is None or not isinstance(run.recipe.compensation, Shares):
        return
    scale_bits, lists = row_scale_bits(budget.factor_bits), run.recipe.list_bits
    for block in model.kinds:
        scales = scale_bits * sum(x.out_features for g in block.groups for x in g.linears) / block.num_weights
        if budget.extra_bits - lists < scales:
            after = f" after lists of channels that take {lists:g}" if lists else ""
            raise ConfigError(
                f"a budget of {budget.extra_bits:g} bits per weight buys nothing{after}: the scales of an adapter's "
                f"rows alone take {scales:.3f} in {block.prefix}; give more, or choose budget.factor_bits = 16"
            )


def _check_disk(run: RunConfig, output_bytes: int) -> None:
    place = run.output
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{run.output} cannot be made: {place} is a file; choose another output directory")
    free = shutil.disk_usage(place).free
    if free < output_bytes:
        raise NoRoomError(
            f"{place} has {free / 2**20:.0f} MiB free, the checkpoint needs about {output_bytes / 2**20:.0f} MiB; "
            "free some space or choose another output directory"
        )
