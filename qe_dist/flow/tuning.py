"""Blocks are tuned in order: each on what the quantized blocks before it make of the calibration, against what the
full-precision blocks make of it (docs/how/tuning.md).

Both inputs of the block whose turn it is lie in the run directory, so any worker can take it from there. What enters
the next block is spooled before a block is published: a finished block is never tuned again. The training of a block
is saved now and then, and whoever takes the block goes on from there with the same bits.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from qe_dist import archs
from qe_dist.archs.base import Family
from qe_dist.core.batch import HELD_OUT, PADDING, Batch, joined
from qe_dist.core.errors import ConfigError
from qe_dist.core.quantized import QuantizedGroup
from qe_dist.core.spec import BlockSpec, ModelSpec
from qe_dist.flow.config import RunConfig
from qe_dist.io.checkpoint import finished_groups
from qe_dist.io.run_dir import RunDir
from qe_dist.io.spool import Spool, Spooled
from qe_dist.methods.base import GroupProblem
from qe_dist.methods.block import BlockProblem, Forward, TunedBlock
from qe_dist.numerics.sign_sgd import Training
from qe_dist.numerics.tuned_linear import FrozenGroup, Group, GroupLinear, SharedInput

SAVE_SECONDS = 10.0
"""Time between two saves of a training, at least."""
SAVE_SHARE = 0.05
"""Share of the time that saves may take."""


class QuantizedPath:
    """The calibration on its way through the quantized blocks of one run, beside that through the full-precision ones,
    one block at a time."""

    def __init__(self, run: RunConfig, arch: Family, exact: Spool, num_blocks: int, num_batches: int) -> None:
        """exact: the spool of full-precision inputs, which all runs share."""
        self.run, self.arch, self.exact = run, arch, exact
        self.store = RunDir(run.output)
        self.quantized = Spool(self.store, "quantized")
        self.num_blocks, self.num_batches = num_blocks, num_batches

    def tune(
        self,
        module: nn.Module,
        view: BlockSpec,
        groups: Mapping[str, QuantizedGroup],
        problems: Mapping[str, GroupProblem],
        held_out_below: int,
        watch: Callable[[int, float], None],
    ) -> TunedBlock:
        """Tunes a block, and spools what enters the next one. groups: the closed form. watch: is told how it goes."""
        targets = joined(list(self._exact_outputs(module, view))).hidden
        entering = (self._entering(view, index) for index in range(self.num_batches))
        inputs = joined([batch.to(self.run.device) for batch in entering])
        block = BlockProblem(
            groups=groups,
            problems=problems,
            factor_bits=self.run.recipe.budget.factor_bits,
            place=lambda placed: self._placed(module, view, placed, inputs),
            targets=targets,
            real=inputs.modality != PADDING,
            held_out=inputs.held_out(held_out_below)[:, 0],
            seed=self.run.seed + 1000 * view.index,
            watch=watch,
            training=None if (saved := self.store.training(view.index)) is None else Training.from_tensors(saved),
            keep=_Saver(self.store, view.index),
        )
        tuned = self.run.recipe.tune(block)
        self._pass_on(module, view, tuned.groups)
        return tuned

    def catch_up(self, module: nn.Module, view: BlockSpec) -> None:
        """Spools what enters the block behind a finished one, where that is still to be tuned and lacks it."""
        unfinished = next((i for i in range(self.num_blocks) if not self.store.has_block(i)), None)
        if unfinished is None:
            return
        if tunable_from(self.store, self.exact.store, unfinished, self.num_batches) <= view.index < unfinished:
            for _ in self._exact_outputs(module, view):
                pass
            self._pass_on(module, view, finished_groups(self.store, view))

    def forget(self, index: int) -> None:
        """Removes what entered a block that is published now, and its training."""
        self.store.drop_batches_before(index + 1, "quantized")
        self.store.drop_training(index)

    def close(self) -> None:
        """Ends the threads of the spool."""
        self.quantized.close()

    def _entering(self, view: BlockSpec, index: int) -> Batch:
        """Nothing is quantized in front of the first block."""
        return (self.quantized if view.index else self.exact).get(Spooled(view.index, index))

    def _exact_outputs(self, module: nn.Module, view: BlockSpec) -> Iterator[Batch]:
        """What the full-precision block makes of full-precision inputs, spooled as input of the next block."""
        for index in range(self.num_batches):
            batch = self.exact.get(Spooled(view.index, index)).to(self.run.device)
            batch = batch.with_hidden(self.arch.run_block(module, batch, view.index))
            self._put(self.exact, view, batch)
            yield batch
        self.exact.flush()

    def _pass_on(self, module: nn.Module, view: BlockSpec, groups: Mapping[str, QuantizedGroup]) -> None:
        """Spools what the quantized block makes of its quantized inputs."""
        frozen = {name: FrozenGroup(group) for name, group in groups.items()}
        quantized = with_groups(module, view, frozen)
        for index in range(self.num_batches):
            batch = self._entering(view, index).to(self.run.device)
            self._put(self.quantized, view, batch.with_hidden(self.arch.run_block(quantized, batch, view.index)))
        self.quantized.flush()

    def _put(self, spool: Spool, view: BlockSpec, batch: Batch) -> None:
        if view.index + 1 < self.num_blocks:
            spool.put(view.index + 1, batch.to("cpu"))

    def _placed(self, module: nn.Module, view: BlockSpec, groups: Mapping[str, Group], inputs: Batch) -> Forward:
        block = with_groups(module, view, groups)

        def forward(rows: Tensor) -> Tensor:
            return self.arch.decoder.run(block, inputs.take(rows.to(inputs.hidden.device)), view.index)

        return forward


class _Saver:
    """Saves a training every SAVE_SECONDS, or less often where a save takes long."""

    def __init__(self, store: RunDir, block: int) -> None:
        self.store, self.block = store, block
        self.due = time.monotonic() + SAVE_SECONDS

    def __call__(self, training: Training) -> None:
        begin = time.monotonic()
        if begin >= self.due:
            self.store.put_training(self.block, training.tensors())
            now = time.monotonic()
            self.due = now + max(SAVE_SECONDS, (now - begin) / SAVE_SHARE)


def check_tuning(run: RunConfig, model: ModelSpec, num_samples: int, most_tokens: int) -> list[str]:
    """Raises ConfigError for a run that tunes and cannot. Returns what the user should know: that it would learn more
    than the calibration can tell. most_tokens: of the calibration, at most."""
    if run.from_block and any(recipe.tuning is not None for recipe in (run.recipe, *(r for _, r in run.earlier))):
        raise ConfigError(
            "a recipe with tune is for all blocks, each of which is tuned on what the ones before it make of the "
            "calibration: leave out --from-block and choose another output"
        )
    if run.recipe.tuning is None:
        return []
    if not archs.get(model.arch).decoder.reads_tables_alone:
        raise ConfigError(
            f"{run.model}: blocks of {model.arch} read more than rotary tables beside the hidden states, and tune "
            "cannot take that apart by sample yet; quantize it with a recipe without tune"
        )
    if num_samples < HELD_OUT:
        raise ConfigError(
            f"{run.calibration} has {num_samples} samples, and tune needs {HELD_OUT} at least: it keeps what is best "
            f"on one of {HELD_OUT}, which is held out; add samples"
        )
    block = max(model.blocks, key=lambda block: block.num_weights)
    wanted = block.num_weights // block.groups[0].in_features
    if most_tokens >= wanted:
        return []
    return [
        f"tune learns {block.num_weights} roundings of a block from {most_tokens} tokens at most; with fewer than "
        f"{wanted} there are more of them than outputs to learn from"
    ]


def tunable_from(store: RunDir, exact: RunDir, unfinished: int, num_batches: int) -> int:
    """The last block up to `unfinished` whose quantized and full-precision inputs are there; 0 if there is none."""
    return next(
        (
            block
            for block in range(unfinished, 0, -1)
            if store.has_batches(block, num_batches, "quantized") and exact.has_batches(block, num_batches)
        ),
        0,
    )


def with_groups(module: nn.Module, view: BlockSpec, groups: Mapping[str, Group]) -> nn.Module:
    """A block that shares all tensors with `module`, and has these groups in the place of its linears."""
    tensors = (*module.parameters(), *module.buffers())
    block = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for group in view.groups:
        shared = SharedInput(groups[group.name], len(group.linears))
        for linear in group.linears:
            bias: Any = module.get_submodule(linear.name).bias  # a tensor, or None
            block.set_submodule(linear.name, GroupLinear(linear.name, bias, shared))
    return block
