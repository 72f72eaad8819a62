"""Ray clusters: one inside of the tests' process, and one as a person starts it, by `ray start` with a token."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from qe_cluster.launch import ray_cluster

from qe_dist.flow import local
from qe_dist.flow.config import RunConfig

START_SECONDS = 180


@dataclass(frozen=True)
class StartedCluster:
    address: str
    dashboard: str
    token: str

    def environment(self, **changes: str) -> dict[str, str]:
        """Of a person who has the token."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_A", "PYTEST"))}
        return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token} | changes

    def run(self, *command: object, **changes: str) -> subprocess.CompletedProcess[str]:
        """Python with these arguments, in that person's place."""
        words = [sys.executable, *map(str, command)]
        return subprocess.run(words, env=self.environment(**changes), capture_output=True, text=True, timeout=300)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(None, 2):
        yield


@pytest.fixture(scope="module")
def expected(run: RunConfig) -> dict[str, bytes]:
    """What one process writes of a module's fixture `run`."""
    local.quantize(run)
    return files(run.output)


@pytest.fixture(scope="session")
def started() -> Iterator[StartedCluster]:
    port, dashboard, client = free_ports(3)
    cluster = StartedCluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", secrets.token_hex(32))
    folder = Path(tempfile.mkdtemp(prefix="qe-", dir="/tmp"))  # paths of sockets must be short
    options = {
        "--port": port,
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": dashboard,
        "--ray-client-server-port": client,
        "--dashboard-agent-listen-port": 0,
        "--min-worker-port": 0,
        "--max-worker-port": 0,
        "--num-cpus": 2,
        "--object-store-memory": 200 * 2**20,
        "--temp-dir": folder,
    }
    words = [str(word) for pair in options.items() for word in pair]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a job is run by the first python in it
    (folder / "qe_dist.py").write_text("raise RuntimeError('found where the head node was started')")
    log = folder / "start.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *words],
            env=cluster.environment(PATH=path, RAY_USAGE_STATS_ENABLED="0"),
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield cluster
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
