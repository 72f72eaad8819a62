"""The model of the schedule keeps the laws that every schedule keeps, and agrees with sums done by hand."""

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from timeline import Costs, Task, Work, even_waves, play, predict, spread

seconds = st.floats(0.0, 10.0)
costs = st.builds(
    Costs,
    startup=seconds,
    load=seconds,
    forward=seconds,
    fit=st.lists(seconds, min_size=1, max_size=4).map(tuple),
    embed=seconds,
    transfer=seconds,
    spool_write=seconds,
    spool_read=seconds,
    read=seconds,
    finish=seconds,
)
counts = st.integers(1, 9)


def work(blocks, workers, batches, each=None, **options):
    return Work(even_waves(blocks, workers, each), batches, workers, **options)


# -- by hand


def test_one_worker_takes_the_sum():
    one = Costs(startup=5, load=2, forward=3, fit=(4.0, 6.0), embed=0, transfer=0.5, read=1, finish=7)
    found = predict(one, work(blocks=4, workers=1, batches=10))
    stream = 10 * (4 * 3 + 0.5)
    assert found.seconds == pytest.approx(5 + 4 * 1 + 4 * 2 + stream + 4 * 10 + 7)
    assert found.path == pytest.approx(
        {"start-up": 5, "read": 4, "load": 8, "transfer": 5, "forward": 120, "fit": 40, "finish": 7}
    )
    assert found.utilisation == pytest.approx((120 + 40) / found.seconds)


def test_a_pipeline_of_two_waits_for_one_batch_only():
    found = predict(Costs(startup=0, load=0, forward=1, fit=(5.0,)), work(blocks=4, workers=2, batches=10))
    assert found.seconds == pytest.approx((10 + 1) * 2 + 2 * 5)


def test_a_slow_embedder_sets_the_pace():
    found = predict(Costs(startup=0, load=0, forward=1, fit=(0.0,), embed=3), work(blocks=2, workers=2, batches=10))
    assert found.seconds == pytest.approx(10 * 3 + 2)
    assert found.path["embed"] == pytest.approx(30)


def test_waves_read_the_next_blocks_while_they_fit():
    one = Costs(startup=0, load=1, forward=1, fit=(8.0,), read=6)
    found = predict(one, work(blocks=2, workers=1, batches=5, each=1))
    assert found.seconds == pytest.approx((6 + 1 + 5 + 8) + (1 + 5 + 8))


def test_a_spool_is_written_behind_and_ends_before_the_next_wave():
    one = Costs(startup=0, load=0, forward=2, fit=(0.0,), spool_write=1, spool_read=1)
    found = predict(one, work(blocks=2, workers=1, batches=5, each=1))
    assert found.seconds == pytest.approx((5 * 2 + 1) + (1 + 5 * 2))


def test_the_bound_on_batches_in_flight_holds_back_the_embedder():
    two = work(blocks=2, workers=2, batches=6, in_flight=1)
    one = Costs(startup=0, load=0, forward=1, fit=(0.0,), embed=1)
    assert predict(one, two).seconds == pytest.approx(3 * 3 + 1)  # three pairs, each of embed, forward, forward


def test_workers_without_blocks_help_to_fit():
    found = predict(Costs(startup=0, load=0, forward=0, fit=(4.0, 2.0, 2.0)), work(blocks=1, workers=2, batches=1))
    assert found.seconds == pytest.approx(4)


def test_an_embedder_competes_for_the_cores():
    one = Costs(startup=0, load=0, forward=4, fit=(0.0,), embed=1)
    alone = predict(one, work(blocks=1, workers=1, batches=10, cores=2)).seconds
    crowded = predict(one, work(blocks=1, workers=1, batches=10, cores=1)).seconds
    assert alone == pytest.approx(1 + 40)
    assert crowded == pytest.approx(10 + 40)


def test_sharing_slows_everything_equally():
    tasks = [Task("a", ("worker", 0), 1.0, ()), Task("b", ("worker", 1), 3.0, ())]
    assert play(tasks, cores=1) == [pytest.approx((0, 2)), pytest.approx((0, 4))]


# -- laws


@given(costs, counts, counts, counts, st.sampled_from([None, 1, 2]), st.sampled_from([1, 2, math.inf]))
def test_nothing_is_faster_than_its_work_and_its_longest_chain(costs, blocks, workers, batches, each, cores):
    found = predict(costs, work(blocks, workers, batches, each, cores=cores))
    compute = blocks * (batches * costs.forward + sum(costs.fit) + costs.load)
    assert found.seconds >= compute / min(workers, cores) * (1 - 1e-9)
    chain = costs.startup + costs.load + blocks * costs.forward + max(costs.fit) + costs.finish
    assert found.seconds >= chain * (1 - 1e-9)
    assert found.seconds >= batches * costs.embed * (1 - 1e-9)
    assert 0 <= found.utilisation <= 1 + 1e-9


@given(costs, counts, counts, counts, st.sampled_from([None, 1]), st.sampled_from([1, 2, math.inf]))
def test_the_critical_path_has_no_gap(costs, blocks, workers, batches, each, cores):
    found = predict(costs, work(blocks, workers, batches, each, cores=cores))
    assert sum(found.path.values()) == pytest.approx(found.seconds)


@given(seconds, seconds, seconds, counts, counts, counts)
def test_more_workers_are_never_slower_where_moving_is_free(load, forward, fit, blocks, workers, batches):
    free = Costs(startup=0, load=load, forward=forward, fit=(fit,))
    fewer, more = (predict(free, work(blocks, n, batches, in_flight=batches)).seconds for n in (workers, workers + 1))
    assert more <= fewer * (1 + 1e-9)


@given(costs, counts, counts, counts)
def test_fewer_cores_are_never_faster(costs, blocks, workers, batches):
    one, two = (predict(costs, work(blocks, workers, batches, cores=cores)).seconds for cores in (1, 2))
    assert two <= one * (1 + 1e-9)


@given(st.lists(seconds, min_size=1, max_size=20), counts)
def test_spreading_loses_nothing_and_stays_within_a_third_of_the_best(jobs, workers):
    shares = spread(jobs, workers)
    assert sorted(x for share in shares for x in share) == sorted(jobs)
    longest = max(sum(share) for share in shares)
    assert longest <= max(max(jobs), sum(jobs) / workers) * 4 / 3 + max(jobs) / 3 + 1e-9


@given(counts, counts, st.one_of(st.none(), counts))
def test_waves_cover_every_block_once_and_differ_by_one(blocks, workers, each):
    waves = even_waves(blocks, workers, each)
    sizes = [sum(wave) for wave in waves]
    assert sum(sizes) == blocks
    assert max(sizes) - min(sizes) <= 1
    assert all(len(wave) <= workers and max(wave) <= (each or blocks) for wave in waves)
