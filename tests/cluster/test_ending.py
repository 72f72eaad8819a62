"""A command whose cluster is gone says so and exits with 75. Ray alone would end it with 0, or with 1."""

import subprocess
import sys

import pytest

DRIVER = """
import sys, time
import psutil, ray
from qe_cluster import ending
from qe_cluster.launch import ray_cluster
ending.CHECK_SECONDS = 0.2
with ray_cluster(None, 1, object_store_memory=100 * 2**20):
    [victim] = [p for p in psutil.Process().children(recursive=True) if p.name() == sys.argv[1]]
    victim.kill()
    ray.get(ray.remote(lambda: time.sleep(300)).remote())
"""


@pytest.mark.ray
@pytest.mark.parametrize(
    ("victim", "said"),
    [
        ("raylet", "error: the Ray node that this command is connected to was lost"),
        pytest.param("gcs_server", "error: the head of the Ray cluster at", marks=pytest.mark.nightly),
    ],
)
def test_the_end_of_its_node_and_of_the_head_end_a_command_with_75(victim, said) -> None:
    done = subprocess.run([sys.executable, "-c", DRIVER, victim], capture_output=True, text=True, timeout=150)
    assert done.returncode == 75, done.stdout + done.stderr
    assert said in done.stderr
    assert "type the same command again" in done.stderr
    assert done.stderr.count("error:") == 1
