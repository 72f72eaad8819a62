"""What a block takes, counted from its shapes, against the tensors that are alive when the real code runs."""

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qe_dist.core.spec import BlockSpec, InputGroup, LinearSpec
from qe_dist.methods.base import GroupProblem
from qe_dist.methods.block import BlockProblem, Forward
from qe_dist.methods.footprint import Footprint, Sequences, footprint
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.recipes import load_recipe
from qe_dist.numerics.hadamard import online_factors, rotate_blocks, unit
from qe_dist.numerics.stats import GroupStats
from qe_dist.numerics.tuned_linear import Group

TOKENS = SAMPLE = 256
HIDDEN = 256


def block(wide: int) -> BlockSpec:
    def group(name: str, inputs: int, outputs: list[int], reads: str | None = None) -> InputGroup:
        linears = (LinearSpec(f"{name}.{i}", inputs, o, False, "column") for i, o in enumerate(outputs))
        return InputGroup(name, tuple(linears), reads or name)

    qkv, gate_up = group("qkv", HIDDEN, [HIDDEN, 64, 64]), group("gate_up", HIDDEN, [wide, wide])
    return BlockSpec(0, "", (qkv, group("o", HIDDEN, [HIDDEN], "qkv"), gate_up, group("down", wide, [HIDDEN])), ())


class Alive(TorchDispatchMode):
    """Bytes of all tensors made under it that are not gone yet, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.fixture
def no_cycles() -> Iterator[None]:
    """Whatever waits for Python to look for cycles counts: a large tensor must not."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def measured(spec: BlockSpec, recipe: Recipe, dtype: torch.dtype, normal: Callable[..., Tensor]) -> Footprint:
    inputs = {g.name: normal(i, TOKENS, g.in_features).to(dtype) for i, g in enumerate(spec.groups)}
    keys, modality = torch.arange(TOKENS), (torch.arange(TOKENS) % 2).to(torch.int8)
    with Alive() as alive:
        linears = [x for g in spec.groups for x in g.linears]
        weights = {x.name: torch.randn(x.out_features, x.in_features, dtype=dtype) for x in linears}
        own = alive.now
        problems = {}
        for g in spec.groups:
            as_float = {x.name: weights[x.name].float() for x in g.linears}
            stats = GroupStats.empty(as_float, spec.router_width(g), recipe.needs(), SAMPLE)
            problems[g.name] = lambda g=g, stats=stats: GroupProblem(
                g, {x.name: weights[x.name].float() for x in g.linears}, stats, recipe.scheme
            )
            for batch in range(2):
                stats.update(inputs[g.name], inputs[g.router_input], modality, keys + TOKENS * batch)
        del as_float, stats
        kept = alive.most = alive.now
        recipe.fit_block({name: problem() for name, problem in problems.items()})
        return Footprint(weights=own, grams=0, widest_gram=0, sample=kept - own, forward=0, fit=alive.most - kept)


@pytest.mark.usefixtures("no_cycles")
@pytest.mark.parametrize(
    ("name", "wide", "dtype", "slack"),
    [
        ("qe-w4a6", 512, torch.float32, 1.15),  # the dtype of a CPU
        ("qe-w4a6", 1024, torch.bfloat16, 1.15),  # that of a GPU
        ("smoothquant+gptq-w4a6", 1024, torch.bfloat16, 1.15),
        ("lists+gptq+qera-w4a6@0.5", 512, torch.float32, 1.15),
        ("smoothquant+lists+gptq-w4a6", 1024, torch.bfloat16, 1.15),
        ("awq-w4a8", 512, torch.float32, 1.6),
        ("serq-w4a4", 512, torch.bfloat16, 1.6),
        ("qe-paper-w4a6", 1024, torch.bfloat16, 1.6),
    ],
)
def test_a_block_takes_what_is_counted_and_no_more(
    normal: Callable[..., Tensor], name: str, wide: int, dtype: torch.dtype, slack: float
) -> None:
    spec, recipe = block(wide), load_recipe(name)
    said = footprint(spec, [recipe], SAMPLE, TOKENS, dtype.itemsize)
    found = measured(spec, recipe, dtype, normal)
    assert found.weights == said.weights
    assert said.statistics <= found.statistics <= 1.02 * said.statistics  # beside them, a few numbers per channel
    assert found.fit <= said.fit <= slack * found.fit


def test_runs_that_share_a_pass_share_their_statistics() -> None:
    spec, qe, rtn = block(512), load_recipe("qe-w4a6"), load_recipe("rtn-w4a8")
    alone, both = (footprint(spec, runs, SAMPLE, TOKENS, 2) for runs in ([qe], [qe, rtn]))
    assert both == alone
    assert footprint(spec, [rtn], SAMPLE, TOKENS, 2).statistics < alone.statistics


def test_rotating_the_input_of_down_takes_its_copies_while_a_batch_passes(normal: Callable[..., Tensor]) -> None:
    """And a copy of its weight in float32 while the block is fitted."""
    spec, (plain, rotated) = block(1536), (load_recipe(name) for name in ("gptq-w4a8", "hadamard+gptq-w4a8"))
    *others, down = spec.groups
    spec = replace(spec, groups=(*others, replace(down, producers=("gate_up.0", "gate_up.1"))))
    before, after = (footprint(spec, [recipe], SAMPLE, TOKENS, 2) for recipe in (plain, rotated))
    x, factors = normal(0, TOKENS, 1536).bfloat16(), unit(online_factors(1536), torch.float32)
    with Alive() as alive:
        rotate_blocks(x.float(), factors).to(x.dtype)
    taken = alive.most - sum(factor.nbytes for factor in factors)
    assert taken <= after.forward - before.forward < 1.5 * taken
    assert after.fit - before.fit == 4 * 1536 * HIDDEN
    assert after.kept == before.kept


def test_a_worker_keeps_statistics_of_every_block_and_fits_one() -> None:
    found = footprint(block(512), [load_recipe("qe-w4a6")], SAMPLE, TOKENS, 2)
    assert found.peak == found.kept + max(found.forward, found.fit)


def test_tuning_takes_what_is_counted_beside_the_sequences(normal: Callable[..., Tensor], no_cycles: None) -> None:
    """With a block of linears alone; what attention and norms take is within what is counted for activations."""
    spec, recipe, longest = block(512), load_recipe("qera+tune-w4a8g64@0.25f4"), 64
    recipe = replace(recipe, tuning=replace(recipe.tuning, steps=2, batch=4))
    weights = {
        x.name: normal(i, x.out_features, x.in_features)
        for i, x in enumerate(x for g in spec.groups for x in g.linears)
    }
    problems = {}
    for g in spec.groups:
        own = {x.name: weights[x.name] for x in g.linears}
        stats = GroupStats.empty(own, spec.router_width(g), recipe.needs(), SAMPLE)
        x = normal(9, TOKENS, g.in_features)
        stats.update(x, x[:, : spec.router_width(g)], torch.zeros(TOKENS, dtype=torch.int8), torch.arange(TOKENS))
        problems[g.name] = GroupProblem(g, own, stats, recipe.scheme)
    inputs, targets = normal(20, 16, longest, HIDDEN), normal(21, 16, longest, HIDDEN)
    groups = recipe.fit_block(problems)

    def place(twins: Mapping[str, Group]) -> Forward:
        def forward(rows: Tensor) -> Tensor:
            x = inputs[rows].flatten(0, 1)
            read = twins["qkv"].prepare(x)
            attended = sum(twins["qkv"].linear(f"qkv.{i}", read).mean() for i in range(3)) * x
            x = x + twins["o"].linear("o.0", twins["o"].prepare(attended))
            read = twins["gate_up"].prepare(x)
            wide = twins["gate_up"].linear("gate_up.0", read).relu() * twins["gate_up"].linear("gate_up.1", read)
            return (x + twins["down"].linear("down.0", twins["down"].prepare(wide))).unflatten(0, (len(rows), longest))

        return forward

    problem = BlockProblem(
        groups, problems, 4, place, targets, torch.ones(16, longest, dtype=torch.bool), torch.arange(16) < 2, seed=0
    )
    with Alive() as alive:
        recipe.tuning.tune(problem)
    said = recipe.tuning.working_bytes(spec, longest)
    assert alive.most <= said <= 2 * alive.most
    counted = footprint(spec, [recipe], SAMPLE, TOKENS, 4, Sequences(16, longest))
    assert counted.tune == said + 4 * inputs.nbytes
    assert counted.passing == max(counted.forward, counted.fit, counted.tune)
    assert footprint(spec, [load_recipe("qera-w4a8g64@0.25f4")], SAMPLE, TOKENS, 4, Sequences(16, longest)).tune == 0
