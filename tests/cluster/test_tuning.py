"""Tuned blocks on Ray: the bytes of one process, whatever the number of workers, the waves, and who dies when."""

import threading
from dataclasses import replace

import pytest
from qe_cluster import driver

from qe_dist.core.errors import Stopped
from qe_dist.flow.config import RunConfig
from qe_dist.flow.progress import read_state
from qe_dist.io.journal import JOURNAL, read_journal
from qe_dist.io.run_dir import RunDir
from qe_dist.methods.recipes import load_recipe
from qe_dist.methods.tuning.tune import Tune
from tests.cluster.conftest import files
from tests.cluster.test_driver import actors
from tests.gate import in_gate
from tests.tiny import calibration, tiny_model, with_blocks

pytestmark = pytest.mark.ray
BLOCKS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("tuned")
    model, data = tiny_model(root / "model", config=with_blocks(BLOCKS)), calibration(root / "data", 16)
    recipe = replace(load_recipe("qera+tune-w2a16g16@1f4"), tuning=Tune(steps=8, batch=4, rate=0.5))
    return RunConfig(model, recipe, data, root / "local", samples_per_batch=2, sample_tokens=128)


@pytest.mark.parametrize(("workers", "blocks"), in_gate([(2, None)], [(1, None), (2, None), (1, 1), (2, 1)]))
def test_any_number_of_workers_and_waves_gives_the_bytes_of_one_process(
    run, expected, cluster, tmp_path, workers, blocks
):
    one, events = replace(run, output=tmp_path / "out", workers=workers, blocks_per_worker=blocks), []
    summary = driver.quantize(one, listen=lambda event, data: events.append((event, data)))
    assert files(one.output) == expected
    assert [data["index"] for event, data in events if event == "block"] == list(range(BLOCKS)), "not in order"
    assert all(stage["tune"] > 0 for stage in summary.stages)
    assert read_state(read_journal(one.output / ".run" / JOURNAL)[0]).in_order


@pytest.mark.nightly
def test_a_run_that_was_stopped_goes_on_with_other_workers(run, expected, cluster, tmp_path):
    """After the second block; the workers that wait for the third one are let go."""
    one, stop = replace(run, output=tmp_path / "out", workers=2), threading.Event()

    def listen(event, data):
        if event == "block" and data["index"] == 1:
            stop.set()

    with pytest.raises(Stopped):
        driver.quantize(one, listen=listen, stop=stop)
    done = [RunDir(one.output).has_block(i) for i in range(BLOCKS)]
    assert done[:2] == [True, True]
    assert not all(done)
    driver.quantize(replace(one, workers=1))
    assert files(one.output) == expected


@pytest.mark.parametrize(
    ("nth", "who", "blocks"), in_gate([(1, 0, None)], [(1, 0, None), (2, -1, None), (1, 0, 1), (3, -1, 1)])
)
def test_a_worker_that_is_killed_while_blocks_are_tuned_is_replaced(run, expected, cluster, tmp_path, nth, who, blocks):
    """Whoever tunes the next block, or waits for it; the wave is streamed again, and no finished block is made anew."""
    one, events = replace(run, output=tmp_path / "out", workers=2, blocks_per_worker=blocks), []

    def listen(event, data):
        events.append((event, data))
        if event == "block" and [e for e, _ in events].count("block") == nth:
            actors()[who].kill()

    driver.quantize(one, listen=listen)
    assert files(one.output) == expected
    assert [data["index"] for event, data in events if event == "block"] == list(range(BLOCKS))
    assert [event for event, _ in events].count("lost") == 1
