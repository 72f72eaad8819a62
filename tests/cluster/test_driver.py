"""Ray gives the bytes that one process gives, whatever the number of workers, the waves, and who dies when."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from qe_cluster import driver
from qe_cluster.launch import ray_cluster

from qe_dist.core.errors import CheckpointError
from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.io.checkpoint import read_manifest
from qe_dist.methods.recipes import load_recipe
from tests.tiny import calibration, tiny_model

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("ray")
    model, data = tiny_model(root / "model"), calibration(root / "data", 12)
    recipe = load_recipe("qe-w4a6")
    return RunConfig(model, recipe, data, root / "local", samples_per_batch=2, sample_tokens=512)


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(None, 2):
        yield


@pytest.fixture(scope="module")
def expected(run):
    local.quantize(run)
    return files(run.output)


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.mark.parametrize(("workers", "blocks"), [(1, None), (2, None), (1, 1)])
def test_any_number_of_workers_and_waves_gives_the_bytes_of_one_process(
    run, expected, cluster, tmp_path, workers, blocks
):
    one = replace(run, output=tmp_path / "out", workers=workers, blocks_per_worker=blocks)
    events = []
    summary = driver.quantize(one, listen=lambda event, data: events.append(event))
    assert files(one.output) == expected
    assert events.count("block") == 2
    assert summary.continued == 0
    assert summary.tokens > 0
    assert len(summary.stages) == (2 if blocks or workers == 2 else 1)


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "visual.merger.mlp.0.weight"])
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
        "--samples-per-batch": run.samples_per_batch,
        "--sample-tokens": run.sample_tokens,
    }
    words = [str(word) for pair in options.items() for word in pair]
    return [sys.executable, "-m", "qe_pipelines.main", "quantize", str(run.model), *words]


def test_the_command_killed_in_the_middle_and_typed_again_gives_the_same_bytes(run, expected, tmp_path):
    output = tmp_path / "killed"
    finished = output / ".run" / "blocks"
    process = subprocess.Popen(command(run, output), stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(finished.glob("block-*.json")):
        assert process.poll() is None, "the command ended before it could be killed"
        assert time.monotonic() < deadline, "no block was finished"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1.0)  # let workers notice that their driver is gone
    done = {p.name: p.stat().st_mtime_ns for p in finished.glob("block-*.safetensors")}
    assert not (output / "config.json").exists()
    again = subprocess.run(command(run, output), capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert "continued" in again.stdout
    assert files(output) == expected
    assert read_manifest(output)["fallbacks"] == {}
    for name, when in done.items():
        assert (output / name).stat().st_mtime_ns == when, f"{name} was fitted again"
