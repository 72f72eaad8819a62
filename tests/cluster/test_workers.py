"""A lost worker is told from an error of its work, and a place that goes down with its node is not waited for."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from qe_cluster.workers import loss_reason, out_of_memory
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayTaskError

from benchmarks.ray_nodes import Nodes
from qe_dist.core.errors import CheckpointError
from tests.tiny import calibration, tiny_model


def task_error(cause):
    return RayTaskError("forward", "Traceback of the worker", cause)


def test_an_error_of_the_work_is_raised_as_itself():
    fault = CheckpointError("a tensor contains NaN")
    with pytest.raises(CheckpointError) as raised:
        loss_reason(task_error(task_error(fault)))
    assert raised.value is fault


def test_a_lost_worker_is_named_in_one_line():
    assert loss_reason(NodeDiedError("its node\n failed because of a power cut")) == (
        "a worker died: failed because of a power cut"
    )
    assert loss_reason(task_error(ActorDiedError())).startswith("a worker died: ")


KILLED = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: abc) was "
    "15.21GB used / 16.00GB limit (0.950625)\n(actor StageActor, pid=4711, actual memory used=9.80GB, worker ID=def)"
)


def test_a_worker_that_ran_out_of_memory_is_told_with_what_it_had():
    said = "Ray killed process 4711, which had 9.80 GB, when node 10.0.0.7 had 15.21 of 16.00 GB in use"
    assert loss_reason(task_error(OutOfMemoryError(KILLED))) == said
    assert out_of_memory(ActorDiedError()) is None


REPLACES = """
import sys, time
from pathlib import Path
import psutil, ray
from benchmarks.ray_nodes import below, kill_process
from qe_cluster.launch import ray_cluster
from qe_cluster.workers import WorkerPool
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import prepare_run
from qe_dist.methods.recipes import load_recipe
address, node, model, data, output = sys.argv[1], int(sys.argv[2]), *map(Path, sys.argv[3:])
run = RunConfig(model, load_recipe("qe-w4a6"), data, output, workers=2)
with ray_cluster(address, 2):
    pool, here = WorkerPool(prepare_run(run).task, 60.0), ray.get_runtime_context().get_node_id()
    pool.acquire()
    away = next(worker for worker in pool.workers if worker.node != here)
    begin = time.monotonic()
    for process in (*below(node), psutil.Process(node)):
        kill_process(process)
    assert not pool.replace(away)  # while Ray still believes that its node is alive
    print("gave up after", time.monotonic() - begin)
    assert [worker.node for worker in pool.workers] == [here]
    assert pool.lost_places == [away.place]
    pool.acquire()
    assert len(pool.workers) == 1
    pool.close()
"""


@pytest.mark.ray
@pytest.mark.nightly
def test_a_worker_that_starts_on_a_node_that_dies_is_given_up_at_once(tmp_path):
    """Ray would wait for room for its place elsewhere, and there is none."""
    model, data = tiny_model(tmp_path / "model"), calibration(tmp_path / "data")
    with tempfile.TemporaryDirectory(prefix="qe-", dir="/tmp") as folder:  # paths of sockets must be short
        nodes = Nodes(2, Path(folder, "ray"))
        try:
            words = (nodes.address, nodes.processes[1].pid, model, data, tmp_path / "out")
            command = [sys.executable, "-c", REPLACES, *map(str, words)]
            done = subprocess.run(command, env=nodes.env, capture_output=True, text=True, timeout=600)
        finally:
            nodes.close()
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 60, "as long as Ray waits"
