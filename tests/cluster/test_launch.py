"""Which cluster a run gets, and what it says of one that it cannot have."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.nightly]

JOIN = """
import sys
import ray
from qe_cluster.launch import ray_cluster, resources
address = sys.argv[1] if len(sys.argv) > 1 else None
print(resources(address))
with ray_cluster(address, 1):
    print("joined port", ray.get_runtime_context().gcs_address.rpartition(":")[2])
"""
OTHER_RAY = """
import json, sys
import ray
from ray._raylet import GcsClient
from qe_cluster.launch import ray_cluster
head = GcsClient(address=sys.argv[1])
told = head.internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster")
other = json.dumps(json.loads(told) | {"ray_version": "2.52.0"}).encode()
head.internal_kv_put(b"CLUSTER_METADATA", other, True, namespace=b"cluster")
try:
    with ray_cluster(sys.argv[1], 1):
        pass
finally:
    head.internal_kv_put(b"CLUSTER_METADATA", told, True, namespace=b"cluster")
"""
OTHER_CODE = """
import sys
import qe_dist
from qe_cluster.launch import ray_cluster
qe_dist.__version__ = "9.9"
with ray_cluster(sys.argv[1], 1):
    pass
"""
START = """
import json, os
import psutil, ray
from qe_cluster.launch import ray_cluster
with ray_cluster(None, 3, object_store_memory=100 * 2**20):
    servers = [p for p in psutil.Process().children(recursive=True) if p.name() == "gcs_server"]
    modes = [p.environ().get("RAY_AUTH_MODE") for p in servers]
    nice = ray.get(ray.remote(lambda: os.nice(0)).remote())
    print(json.dumps([ray.cluster_resources(), modes, nice]))
"""
LATE = """
import os, signal, sys, threading, time
import psutil, ray
from qe_cluster.launch import ray_cluster
port = int(sys.argv[1].rpartition(":")[2])
head = next(c.pid for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == "LISTEN")
os.kill(head, signal.SIGSTOP)
threading.Timer(float(sys.argv[2]), os.kill, (head, signal.SIGCONT)).start()
begin = time.monotonic()
with ray_cluster(sys.argv[1], 1):
    print("joined after", time.monotonic() - begin)
"""


def joined(cluster) -> str:
    return f"joined port {cluster.address.rpartition(':')[2]}\n"


def test_a_run_joins_the_cluster_that_is_named(started) -> None:
    done = started.run("-c", JOIN, started.address)
    assert "Resources(cpus=2, gpus=0)" in done.stdout, done.stderr
    assert joined(started) in done.stdout


def test_a_run_inside_a_job_joins_the_cluster_of_the_job(started) -> None:
    done = started.run("-c", JOIN, RAY_ADDRESS=started.address)
    assert joined(started) in done.stdout, done.stderr


@pytest.mark.parametrize("change", [{"RAY_AUTH_TOKEN": "wrong"}, {"RAY_AUTH_MODE": "disabled"}], ids=["wrong", "none"])
def test_without_the_token_it_says_where_a_token_goes(started, change) -> None:
    done = started.run("-c", JOIN, started.address, **change)
    assert "ConfigError: the Ray cluster at" in done.stderr
    assert "set RAY_AUTH_MODE=token" in done.stderr


def test_nobody_at_the_address(started) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    done = started.run("-c", JOIN, f"127.0.0.1:{port}")
    assert f"ConfigError: no Ray cluster answers at 127.0.0.1:{port}" in done.stderr


def test_a_head_that_is_too_busy_to_answer_at_once_is_asked_again(started) -> None:
    done = started.run("-c", LATE, started.address, "12")
    assert float(done.stdout.split()[-1]) >= 12, done.stderr


def test_the_address_of_a_dashboard_leads_to_submit(started) -> None:
    done = started.run("-c", JOIN, started.dashboard)
    assert "ConfigError" in done.stderr
    assert "use qe-dist submit" in done.stderr


def test_a_cluster_of_another_ray_is_refused_with_both_versions(started) -> None:
    done = started.run("-c", OTHER_RAY, started.address)
    assert "ConfigError: the Ray cluster at" in done.stderr
    assert "Ray: 2.52.0" in done.stderr


def test_a_node_with_other_code_is_refused_with_both_versions(started) -> None:
    done = started.run("-c", OTHER_CODE, started.address)
    assert "ConfigError: all nodes must have the same code" in done.stderr
    assert "qe_dist 9.9" in done.stderr


def alone(script: str, **changes: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    words = [sys.executable, "-c", script]
    return subprocess.run(words, env=kept | changes, capture_output=True, text=True, timeout=120)


def test_a_cluster_that_is_started_here_wants_a_token_and_has_the_store_it_is_given() -> None:
    done = alone(START)
    have, modes, nice = json.loads(done.stdout)
    assert modes == ["token"]
    assert nice == os.nice(0), "workers must have their share of a busy machine"
    assert have["CPU"] >= 3
    assert have["object_store_memory"] == 100 * 2**20


def test_a_home_that_cannot_hold_the_token_is_named() -> None:
    done = alone(START, HOME="/dev/null/home")
    assert "ConfigError: Ray could not start" in done.stderr
    assert "/dev/null/home" in done.stderr
