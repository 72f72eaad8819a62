"""The plan: every block once, in order, within memory, and refusals before the first byte of work."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qe_dist.core.errors import ConfigError
from qe_dist.core.spec import BlockSpec, InputGroup, LinearSpec, ModelSpec
from qe_dist.flow.config import RunConfig
from qe_dist.flow.plan import Task, WorkerCapacity, check_runs, cost_notes, make_plan, plan_wave, share_out
from qe_dist.methods.base import Budget
from qe_dist.methods.recipes import load_recipe

RUN = RunConfig(Path("model"), load_recipe("qe-w4a6"), Path("data.jsonl"), Path("/tmp/out"))


def model(num_blocks: int, width: int = 64) -> ModelSpec:
    def block(i: int) -> BlockSpec:
        linear = LinearSpec("mlp.up_proj", width, 2 * width, False, "column")
        return BlockSpec(i, f"model.layers.{i}.", (InputGroup("mlp.up", (linear,), "mlp.up"),), ())

    return ModelSpec("some", tuple(block(i) for i in range(num_blocks)), ())


def task(num_blocks: int, run: RunConfig = RUN, width: int = 64) -> Task:
    return Task(model(num_blocks, width), (run,), batch_tokens=100, num_samples=8)


def capacities(*memory: int, speeds: tuple[float, ...] = ()) -> list[WorkerCapacity]:
    return [WorkerCapacity(m, s) for m, s in zip(memory, speeds or (1.0,) * len(memory), strict=True)]


@given(st.integers(1, 90), st.lists(st.floats(0.2, 5.0), min_size=1, max_size=9), st.integers(0, 9), st.integers(0, 90))
def test_every_block_from_the_first_on_is_done_once_and_in_order(blocks, speeds, each, first):
    run = replace(RUN, blocks_per_worker=each or None)
    workers = capacities(*[2**40] * len(speeds), speeds=tuple(speeds))
    waves = make_plan(task(blocks, run), workers, first_block=min(first, blocks))
    done = [b.index for wave in waves for stage in wave for b in stage.blocks]
    assert done == list(range(min(first, blocks), blocks))
    assert all(len({stage.worker for stage in wave}) == len(wave) <= len(workers) for wave in waves)
    assert all(len(stage.blocks) <= each for wave in waves for stage in wave) if each else len(waves) <= 1


def test_tokens_of_held_out_sequences_take_memory_where_there_are_any():
    few, many = (replace(task(2), num_samples=count) for count in (15, 16))
    before, after = (one.footprint(one.model.blocks[0]) for one in (few, many))
    assert after.sample == before.sample * 9 / 8 > 0
    assert (after.weights, after.grams) == (before.weights, before.grams)
    stages = [make_plan(one, capacities(2**40))[0][0] for one in (few, many)]
    assert stages[0].held_out_below == 0 < stages[1].held_out_below


def test_blocks_per_worker_follow_from_the_memory_of_each():
    need = task(12).footprint(task(12).model.blocks[0])
    memory = [need.passing + int(count * need.kept) for count in (3.5, 0.5, 1.5)]
    waves = make_plan(task(12), capacities(*memory))
    assert [[(s.worker, len(s.blocks)) for s in wave] for wave in waves] == [[(0, 3), (2, 1)]] * 3


def test_gram_matrices_go_to_the_host_where_the_device_has_no_room_for_one_block():
    """Only those of the group that is being fitted must be on the device then."""
    one = task(12, replace(RUN, device="cuda"), width=512)
    groups = tuple(replace(one.model.blocks[0].groups[0], name=n, router_input=n) for n in ("mlp.up", "mlp.gate"))
    blocks = tuple(replace(block, groups=groups) for block in one.model.blocks)
    both = replace(one, model=replace(one.model, blocks=blocks))
    need = both.footprint(blocks[0])
    assert need.grams == 2 * need.widest_gram > 0
    small = need.passing + need.kept - need.widest_gram
    (stage,) = plan_wave(both, [WorkerCapacity(small, host_memory=5 * need.grams)], 0)
    assert (len(stage.blocks), stage.grams_on_host) == (1, True)
    with pytest.raises(ConfigError, match="one block needs"):
        plan_wave(both, [WorkerCapacity(small, host_memory=need.grams - 1)], 0)
    (stage,) = plan_wave(both, [WorkerCapacity(need.passing + need.kept, host_memory=2**40)], 0)
    assert not stage.grams_on_host


def test_waves_are_of_equal_size_so_that_none_holds_more_than_it_must():
    waves = make_plan(task(10, replace(RUN, blocks_per_worker=4)), capacities(2**40, 2**40))
    assert [sum(len(s.blocks) for s in wave) for wave in waves] == [5, 5]


@given(st.integers(1, 60), st.lists(st.tuples(st.integers(0, 20), st.floats(0.1, 10.0)), min_size=1, max_size=6))
def test_nobody_could_be_done_sooner_with_one_block_moved(count, workers):
    room, speeds = [r for r, _ in workers], [s for _, s in workers]
    shares = share_out(count, room, speeds)
    assert sum(shares) == min(count, sum(room))
    assert all(0 <= share <= most for share, most in zip(shares, room, strict=True))
    latest = max(share / speed for share, speed in zip(shares, speeds, strict=True))
    slow = next(i for i in range(len(room)) if shares[i] / speeds[i] == latest)
    for i in range(len(room)):
        if i != slow and shares[i] < room[i]:
            assert (shares[i] + 1) / speeds[i] >= latest


def test_a_block_that_does_not_fit_is_refused_now():
    with pytest.raises(ConfigError, match=r"one block needs .* GiB .* on here, has 0.0 GiB\. Use fewer workers"):
        make_plan(task(2, width=4096), [WorkerCapacity(2**20, node="here")])


def test_the_disk_must_hold_what_the_compensation_may_store_for_the_groups_as_it_fits_them(monkeypatch):
    """Here each linear by itself, so that both of them have down matrices and a router."""
    paper = replace(load_recipe("qe-paper-w4a6"), granularity="linear")
    linears = tuple(LinearSpec(name, 64, 128, False, "column") for name in ("gate", "up"))
    spec = ModelSpec("some", (BlockSpec(0, "model.layers.0.", (InputGroup("gate_up", linears, "gate_up"),), ()),), ())
    each = 128 * 64 * 5 // 8 + paper.compensation.most_bytes(128, 64, 64, paper.budget)

    def check(free: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=free))
        check_runs(spec, [replace(RUN, recipe=paper)], passthrough_bytes=0)

    check(2 * each)
    with pytest.raises(ConfigError, match="the checkpoint needs about"):
        check(2 * each - 1)


def test_a_full_disk_is_refused_now():
    with pytest.raises(ConfigError, match=r"MiB free, the checkpoint needs about"):
        check_runs(model(2), [RUN], passthrough_bytes=2**60)


def test_what_a_repair_costs_beyond_a_bit_is_told_before_the_work():
    """The adapter of 2 x 64 x 64 weights has 3 x 64 factors of 16 bits for every rank."""
    spec = model(2, width=64)
    assert cost_notes(spec, replace(RUN, recipe=load_recipe("rtn-w4a6"))) == []
    assert cost_notes(spec, replace(RUN, recipe=load_recipe("qera-w4a6@0.5"))) == []
    recipe = replace(load_recipe("qera-w4a6"), budget=Budget(rank=8))
    (note,) = cost_notes(spec, replace(RUN, recipe=recipe))
    assert f"up to {4 + 8 * 3 * 64 * 16 / (2 * 64 * 64):.2f} bits per quantized weight" in note
    assert "4 of codes" in note
