"""Fits are balanced over workers, and large ones stay where their data is."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qe_cluster.balance import REMOTE_COST, balance, fit_cost, travel_bytes

from qe_dist.core.spec import BlockSpec, InputGroup, LinearSpec, ModelSpec
from qe_dist.flow.config import RunConfig
from qe_dist.flow.plan import FitJob, Task
from qe_dist.methods.recipes import load_recipe
from qe_dist.numerics.stats import M

IN, OUT, SAMPLE = 64, 128, 512
GROUP = InputGroup("mlp.up", (LinearSpec("mlp.up_proj", IN, OUT, False, "column"),), "mlp.up")


def test_fits_leave_a_worker_only_for_one_who_would_otherwise_wait():
    jobs = {FitJob(0, block, group): cost for block in (0, 1) for group, cost in (("qkv", 1.0), ("down", 9.0))}
    even = balance(jobs, {job: job.block for job in jobs}, [1.0, 1.0])
    assert even == {job: job.block for job in jobs}
    one_idle = balance(jobs, dict.fromkeys(jobs, 0), [1.0, 1.0])
    assert sorted(one_idle.values()) == [0, 0, 1, 1] or sorted(one_idle.values()) == [0, 0, 0, 1]
    assert balance(jobs, dict.fromkeys(jobs, 0), [1.0, 1.0], stay=jobs) == dict.fromkeys(jobs, 0)
    slow_help = balance(jobs, dict.fromkeys(jobs, 0), [1.0, 0.01])
    assert slow_help == dict.fromkeys(jobs, 0)


@given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=12), st.lists(st.floats(0.5, 2.0), min_size=1, max_size=5))
def test_balanced_fits_never_end_later_than_unbalanced_ones(costs, speeds):
    jobs = {FitJob(0, i, "o"): cost for i, cost in enumerate(costs)}
    owners = {job: job.block % len(speeds) for job in jobs}

    def end(places):
        return max(
            sum(c * (REMOTE_COST if places[j] != owners[j] else 1.0) for j, c in jobs.items() if places[j] == w) / speed
            for w, speed in enumerate(speeds)
        )

    assert end(balance(jobs, owners, speeds)) <= end(owners) * (1 + 1e-9)


def test_a_fit_costs_a_factorization_and_products_with_the_weights():
    assert fit_cost(GROUP) == IN**3 + 4 * OUT * IN**2


@pytest.mark.parametrize(("recipe", "grams"), [("rtn-w4a16", 0), ("qe-w4a6", M)])
def test_weights_sample_and_needed_gram_matrices_travel_in_float32(recipe, grams):
    model = ModelSpec("some", (BlockSpec(0, "model.layers.0.", (GROUP,), ()),), ())
    run = RunConfig(Path("model"), load_recipe(recipe), Path("data.jsonl"), Path("/tmp/out"), sample_tokens=SAMPLE)
    task = Task(model, (run,), batch_tokens=100, num_samples=8)
    assert travel_bytes(GROUP, task, 0) == 4 * (IN * OUT + grams * IN * IN + 2 * SAMPLE * IN)
    more = replace(task, num_samples=16)  # one sequence in sixteen is held out
    assert travel_bytes(GROUP, more, 0) > travel_bytes(GROUP, task, 0)
