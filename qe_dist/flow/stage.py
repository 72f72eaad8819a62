"""The work of one worker: forward batches through its blocks, gather statistics, fit and publish.

Plain Python; Ray makes an actor of it in one line. Batches must come in order of their index: statistics
are sums, and only a fixed order of summation gives the same bits whatever the number of workers. One pass of
statistics serves any number of runs that differ in their recipe.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qe_dist import archs
from qe_dist.core.batch import PADDING, Batch
from qe_dist.core.determinism import pin
from qe_dist.core.spec import BlockSpec, Granularity, InputGroup, per_linear
from qe_dist.flow.config import RunConfig, needs_of
from qe_dist.flow.plan import StagePlan
from qe_dist.flow.source import open_source
from qe_dist.io.checkpoint import block_tensors, report_dict
from qe_dist.io.run_dir import RunDir
from qe_dist.methods.base import GroupProblem
from qe_dist.numerics.stats import GroupStats


class Stage:
    """Consecutive blocks on one device. Blocks that are finished only forward."""

    def __init__(self, runs: Sequence[RunConfig], arch: str, part: StagePlan) -> None:
        self.run, self.runs, self.arch = runs[0], runs, archs.get(arch)
        pin(self.run.threads)
        self.part, self.blocks = part, []
        self.next_index = 0
        self.seconds = {"load": 0.0, "forward": 0.0, "fit": 0.0}

    def load(self) -> None:
        """Reads the blocks' weights. Apart from the constructor, so that an error arrives as itself from an actor."""
        start = time.perf_counter()
        self.source = open_source(self.run)
        self.blocks = [_Block(self, spec) for spec in self.part.blocks]
        self.seconds["load"] += time.perf_counter() - start

    def forward(self, batch: Batch) -> Batch:
        """Hidden states after this stage's blocks; counts the batch into the statistics."""
        assert batch.index == self.next_index, f"batch {batch.index} out of order"
        self.next_index += 1
        start = time.perf_counter()
        for block in self.blocks:
            batch = batch.with_hidden(block.forward(batch))
        self.seconds["forward"] += time.perf_counter() - start
        return batch.with_hidden(batch.hidden.cpu())

    def finish(self, batch: Batch, next_block: int | None) -> int:
        """Forward of the last stage of a wave: spools what enters `next_block`. Returns the number of tokens."""
        batch = self.forward(batch)
        if next_block is not None:
            RunDir(self.run.output).put_batch(next_block, batch)
        return batch.num_tokens

    def fit(self, index: int) -> dict[str, Any]:
        """Fits and publishes one block for every run, and forgets its statistics. Returns the first run's report."""
        start = time.perf_counter()
        block = next(b for b in self.blocks if b.spec.index == index)
        for run in self.runs:
            store = RunDir(run.output)
            if not store.has_block(index):
                view = block.views[run.recipe.granularity]
                groups = run.recipe.fit_block({g.name: block.problem(g, run) for g in view.groups})
                store.put_block(index, block_tensors(view, groups, self.source), report_dict(index, groups, view))
        block.stats.clear()
        self.seconds["fit"] += time.perf_counter() - start
        return RunDir(self.run.output).block_report(index) | {"seconds": time.perf_counter() - start}

    def usage(self) -> dict[str, float]:
        """Seconds by activity and peak memory of this process in MiB."""
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return self.seconds | {"peak_mib": peak}


class _Block:
    def __init__(self, stage: Stage, spec: BlockSpec) -> None:
        run, self.arch, self.spec = stage.run, stage.arch, spec
        self.module = stage.arch.block(stage.source, spec, run.device, run.dtype)
        self.inputs: dict[str, Tensor] = {}
        self.stats: dict[str, GroupStats] = {}
        waiting = [r for r in stage.runs if not RunDir(r.output).has_block(spec.index)]
        self.views = {r.recipe.granularity: _view(spec, r.recipe.granularity) for r in waiting}
        for view in self.views.values():
            for group in view.groups:
                self.stats[group.name] = GroupStats.empty(
                    self.weights(group), view.router_width(group), needs_of(waiting), run.sample_tokens
                )
                reader = self.module.get_submodule(group.linears[0].name)
                reader.register_forward_pre_hook(self._catcher(group.name))

    def _catcher(self, name: str):
        def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs[name] = args[0]

        return catch

    def weights(self, group: InputGroup) -> Mapping[str, Tensor]:
        modules = {x.name: self.module.get_submodule(x.name) for x in group.linears}
        return {name: module.weight.float() for name, module in modules.items()}

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.arch.run_block(self.module, batch)
        if self.stats:
            real = batch.modality != PADDING
            modality, keys = batch.modality[real], batch.token_keys()[real]
            real = real.to(hidden.device)
            rows = {name: x[real] for name, x in self.inputs.items()}
            modality, keys = modality.to(hidden.device), keys.to(hidden.device)
            for group in (g for view in self.views.values() for g in view.groups):
                self.stats[group.name].update(rows[group.name], rows[group.router_input], modality, keys)
            self.inputs.clear()
        return hidden

    def problem(self, group: InputGroup, run: RunConfig) -> GroupProblem:
        seed = run.seed + 1000 * self.spec.index
        return GroupProblem(group, self.weights(group), self.stats[group.name], run.recipe.scheme, seed)


def _view(spec: BlockSpec, granularity: Granularity) -> BlockSpec:
    return per_linear(spec) if granularity == "linear" else spec
