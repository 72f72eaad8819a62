"""The plan: every block once, in order, within memory, and refusals before the first byte of work."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qe_dist.core.errors import ConfigError
from qe_dist.core.spec import BlockSpec, InputGroup, LinearSpec, ModelSpec
from qe_dist.flow.config import RunConfig
from qe_dist.flow.plan import block_bytes, make_plan
from qe_dist.methods.recipes import load_recipe

RUN = RunConfig(Path("model"), load_recipe("qe-w4a6"), Path("data.jsonl"), Path("/tmp/out"))


def model(num_blocks: int, width: int = 64) -> ModelSpec:
    def block(i: int) -> BlockSpec:
        linear = LinearSpec("mlp.up_proj", width, 2 * width, False, "column")
        return BlockSpec(i, f"model.layers.{i}.", (InputGroup("mlp.up", (linear,), "mlp.up"),), ())

    return ModelSpec("some", tuple(block(i) for i in range(num_blocks)), ())


@given(st.integers(1, 90), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 9)), st.integers(0, 90))
def test_every_block_from_the_first_on_is_done_once_and_in_order(blocks, workers, each, first):
    run = replace(RUN, workers=workers, blocks_per_worker=each)
    plan = make_plan(model(blocks), [run], first_block=min(first, blocks))
    done = [b.index for wave in plan.waves for stage in wave for b in stage.blocks]
    assert done == list(range(min(first, blocks), blocks))
    assert all(len(wave) <= workers for wave in plan.waves)
    assert all(len(stage.blocks) <= each for stage in plan.stages) if each else len(plan.waves) <= 1


def test_blocks_per_worker_follow_from_memory():
    one = block_bytes(model(1).blocks[0], [RUN])
    plan = make_plan(model(12), [replace(RUN, workers=2)], memory=int(2 * 3.5 * one))
    assert [len(stage.blocks) for stage in plan.stages] == [3, 3, 3, 3]
    assert len(plan.waves) == 2


def test_a_block_that_does_not_fit_is_refused_now():
    with pytest.raises(ConfigError, match=r"one block needs .* GiB .* use fewer workers"):
        make_plan(model(2, width=4096), [replace(RUN, workers=2)], memory=2**20)


def test_a_full_disk_is_refused_now():
    with pytest.raises(ConfigError, match=r"MiB free, the checkpoint needs about"):
        make_plan(model(2), [RUN], passthrough_bytes=2**60)
