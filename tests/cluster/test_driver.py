"""Ray gives the bytes that one process gives, whatever the number of workers, the waves, and who dies when."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from qe_cluster import driver, heartbeats

from qe_dist.core.errors import CheckpointError, ConfigError, QEError
from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.io.checkpoint import read_manifest
from qe_dist.io.run_dir import RunDir
from qe_dist.methods.recipes import load_recipe
from tests.cluster.conftest import files
from tests.gate import in_gate
from tests.tiny import calibration, tiny_model, with_blocks

pytestmark = pytest.mark.ray
BLOCKS = 4
IN_A_BLOCK = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("ray")
    model, data = tiny_model(root / "model", config=with_blocks(BLOCKS)), calibration(root / "data", 16)
    recipe = load_recipe("qe-w4a6")
    return RunConfig(model, recipe, data, root / "local", samples_per_batch=2, sample_tokens=512)


@pytest.mark.parametrize(("workers", "blocks"), in_gate([(2, 1)], [(1, None), (2, None), (1, 1), (2, 1)]))
def test_any_number_of_workers_and_waves_gives_the_bytes_of_one_process(
    run, expected, cluster, tmp_path, workers, blocks
):
    one = replace(run, output=tmp_path / "out", workers=workers, blocks_per_worker=blocks)
    events = []
    summary = driver.quantize(one, listen=lambda event, data: events.append((event, data)))
    assert files(one.output) == expected
    told = [event for event, _ in events]
    assert told.count("block") == BLOCKS
    assert told.count("wave") == (BLOCKS // (workers * blocks) if blocks else 1)
    assert summary.continued == 0
    assert summary.tokens > 0
    assert len(summary.stages) == workers


def test_who_has_no_block_left_fits_for_others(run, expected, cluster, tmp_path):
    """Only the last block is missing: the worker that has it is not the only one that fits."""
    ends = quantize_from(run, BLOCKS - 1, tmp_path / "last")
    assert all(stage["fit"] > 0 for stage in ends.stages)
    assert files(tmp_path / "last") == expected


def quantize_from(run, block, output):
    """The run with two workers, continued where `block` is the only one that is missing."""
    local.quantize(replace(run, output=output))
    store = RunDir(output)
    store.reset_blocks(block)
    return driver.quantize(replace(run, output=output, workers=2))


def actors(kind="ray::StageActor"):
    """Processes of actors of this process's Ray."""
    return [p for p in psutil.Process().children(recursive=True) if title(p).startswith(kind)]


def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


@pytest.mark.parametrize(
    ("moment", "nth", "who"),
    in_gate([("block", 1, 0)], [("batch", 2, 0), ("batch", 3, -1), ("block", 1, 0), ("block", 2, -1), ("wave", 2, 0)]),
)
def test_a_worker_that_is_killed_is_replaced_and_nothing_finished_is_done_again(
    run, expected, cluster, tmp_path, moment, nth, who
):
    one, events, killed = replace(run, output=tmp_path / "out", workers=2, blocks_per_worker=1), [], []

    def listen(event, data):
        events.append((event, data))
        if event == moment and [e for e, _ in events].count(moment) == nth and not killed:
            killed.append(actors()[who])
            killed[0].kill()

    driver.quantize(one, listen=listen)
    assert killed
    assert files(one.output) == expected
    fitted = [data["index"] for event, data in events if event == "block"]
    assert sorted(fitted) == list(range(BLOCKS)), "a finished block was fitted again"
    lost = [data for event, data in events if event == "lost"]
    assert [data["reason"].startswith("a worker died") for data in lost] == [True]


@pytest.mark.nightly
def test_a_worker_that_hangs_is_ended_and_replaced(run, expected, cluster, tmp_path, monkeypatch):
    """Nothing would tell: its process, its node and its connections are there."""
    monkeypatch.setattr(heartbeats, "SILENT_BEATS", 5)
    one, events, stopped = replace(run, output=tmp_path / "out", workers=2, blocks_per_worker=1), [], []

    def listen(event, data):
        events.append((event, data))
        if event == "batch" and not stopped:
            stopped.append(actors()[0])
            stopped[0].suspend()

    driver.quantize(one, listen=listen)
    assert stopped
    assert files(one.output) == expected
    assert [event for event, _ in events].count("lost") == 1


@pytest.mark.nightly
def test_a_node_without_memory_ends_the_command_with_75_and_says_who_had_how_much(run, tmp_path):
    words, environment = command(run, tmp_path / "out"), os.environ | {"RAY_memory_usage_threshold": "0.01"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 75, done.stderr
    assert re.search(r"error: Ray killed process \d+, which had [\d.]+ GB, when node .* GB in use", done.stderr)
    assert "fewer --workers" in done.stderr
    assert done.stderr.count("error:") == 1


@pytest.mark.nightly
def test_an_embedder_that_is_killed_is_replaced(run, expected, cluster, tmp_path):
    one, killed = replace(run, output=tmp_path / "out"), []

    def listen(event, data):
        if event == "batch" and not killed:
            killed.extend(actors("ray::Embed"))
            for embedder in killed:
                embedder.kill()

    driver.quantize(one, listen=listen)
    assert killed
    assert files(one.output) == expected


@pytest.mark.nightly
def test_a_worker_that_dies_again_and_again_ends_the_call_with_the_reason(run, cluster, tmp_path):
    def listen(event, data):
        if event == "batch":
            for worker in actors():
                worker.kill()

    with pytest.raises(QEError, match=r"a worker was lost 6 times while no block was finished, lastly: a worker died"):
        driver.quantize(replace(run, output=tmp_path / "out"), listen=listen)


@pytest.mark.nightly
def test_a_cluster_with_less_room_is_made_do_with_and_says_so(run, expected, cluster, tmp_path):
    events = []
    one = replace(run, output=tmp_path / "out", workers=5)
    summary = driver.quantize(one, listen=lambda event, data: events.append((event, data)), worker_timeout=1.0)
    assert len(summary.stages) == 2
    assert ("note", {"text": "5 workers were asked for, the cluster has room for 2 now"}) in events
    assert files(one.output) == expected


@pytest.mark.nightly
def test_who_finds_no_room_at_all_is_told_what_a_worker_needs(run, cluster, tmp_path):
    with pytest.raises(ConfigError, match=r"no worker can start: each needs \{'CPU': 64\}, the cluster has"):
        driver.quantize(replace(run, output=tmp_path / "out", threads=64), worker_timeout=1.0)


@pytest.mark.nightly
def test_a_gpu_is_not_waited_for_where_there_is_none(run, cluster, tmp_path):
    with pytest.raises(ConfigError, match=r"each needs \{'CPU': 1, 'GPU': 1\}.* 0 of 0 GPUs free.* never shared"):
        driver.quantize(replace(run, output=tmp_path / "out", device="cuda"), worker_timeout=1.0)


@pytest.mark.nightly
def test_a_second_command_in_the_same_directory_is_refused_while_the_first_lives(run, cluster, tmp_path):
    one, said = replace(run, output=tmp_path / "out"), []

    def listen(event, data):
        if event == "batch" and not said:
            with pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()} on") as refused:
                local.quantize(one)
            said.append(refused)

    driver.quantize(one, listen=listen)
    assert said


@pytest.mark.parametrize("tensor", in_gate([IN_A_BLOCK], [IN_A_BLOCK, "visual.merger.mlp.0.weight"]))
def test_an_error_in_a_worker_arrives_as_itself(run, cluster, tmp_path, tensor):
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights[tensor][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{tensor} contains NaN"):
        driver.quantize(replace(run, model=folder, output=tmp_path / "out"))
    assert not (tmp_path / "out" / "config.json").exists()


def command(run, output: Path) -> list[str]:
    options = {
        "--recipe": "qe-w4a6",
        "--calibration": run.calibration,
        "--output": output,
        "--workers": 2,
        "--blocks-per-worker": 1,
        "--samples-per-batch": run.samples_per_batch,
        "--sample-tokens": run.sample_tokens,
    }
    words = [str(word) for pair in options.items() for word in pair]
    return [sys.executable, "-m", "qe_pipelines.main", "quantize", str(run.model), *words]


@pytest.mark.parametrize("number", in_gate([signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]))
def test_the_command_that_is_asked_to_stop_publishes_what_is_done_and_exits_with_75(run, expected, tmp_path, number):
    output = tmp_path / "stopped"
    process = subprocess.Popen(command(run, output), stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(process, lambda: list((output / ".run" / "blocks").glob("block-*.json")))
    tell = os.killpg if number == signal.SIGINT else os.kill  # a terminal's Ctrl-C reaches everybody in the group
    tell(process.pid, number)
    assert "type the same command again" in process.communicate(timeout=120)[1]
    assert process.returncode == 75
    assert not (output / "config.json").exists()
    again = subprocess.run(command(run, output), capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert "continued" in again.stdout
    assert files(output) == expected


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the command ended too early"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


@pytest.mark.nightly
def test_the_command_killed_in_the_middle_and_typed_again_gives_the_same_bytes(run, expected, tmp_path):
    output = tmp_path / "killed"
    finished = output / ".run" / "blocks"
    process = subprocess.Popen(command(run, output), stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(process, lambda: list(finished.glob("block-*.json")))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1.0)  # let workers notice that their driver is gone
    done = {p.name: p.stat().st_mtime_ns for p in finished.glob("block-*.safetensors")}
    assert not (output / "config.json").exists()
    again = subprocess.run(command(run, output), capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert "continued" in again.stdout
    assert files(output) == expected
    assert read_manifest(output).fallbacks == {}
    for name, when in done.items():
        assert (output / name).stat().st_mtime_ns == when, f"{name} was fitted again"
