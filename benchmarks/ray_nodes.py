"""Ray nodes on this machine, each of which can be killed: what benchmarks/chaos.py and tests run on."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

STORE_BYTES = 100 * 2**20
HEALTH = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 10000, "failure_threshold": 5}
"""Of the head: it misses a node that was killed after 5 s, and waits ten times as long for one that is starved."""
SETTINGS = {"RAY_worker_niceness": "0", "RAY_worker_register_timeout_seconds": "600"}
"""As of a Ray that the command starts (`qe_cluster.launch.PATIENT`)."""
STARTING = 300.0
"""Seconds that a node has to be in the cluster."""
ALIVE = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
print("alive:", sum(node["Alive"] for node in ray.nodes()))
"""


class Nodes:
    """Ray nodes on this machine, each of which can be killed; the first is the head."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder, self.address = folder, f"127.0.0.1:{_free_port()}"
        self.env = (
            dict(os.environ)
            | SETTINGS
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
            }
        )
        self.processes = [self._start(head=i == 0) for i in range(count)]
        self._await_all()

    def _start(self, head: bool) -> subprocess.Popen[bytes]:
        role = [f"--address={self.address}"]
        env = self.env
        if head:
            role = ["--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false"]
            role += [f"--ray-client-server-port={_free_port()}", f"--temp-dir={self.folder}"]
            env = env | {f"RAY_health_check_{key}": str(value) for key, value in HEALTH.items()}
        size = ["--num-cpus=1", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats", "--block"]
        size += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, *size]
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            process = subprocess.Popen(words, env=env, stdout=log, stderr=log)
        if head:
            self._await_head(process)
        if process.poll() is not None:
            raise RuntimeError(f"ray start ended with {process.returncode}, see {log.name}")
        return process

    def _await_head(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + STARTING
        while not _listens(self.address) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)

    def _await_all(self) -> None:
        """Returns when all are in the cluster."""
        words, deadline = [sys.executable, "-c", ALIVE, self.address], time.monotonic() + STARTING
        while time.monotonic() < deadline:
            said = subprocess.run(words, env=self.env, capture_output=True, text=True).stdout
            if f"alive: {len(self.processes)}" in said:
                return
            # Ray gives up a node that is not there after 30 s, which a busy machine needs.
            self.processes = [self._start(head=False) if p.poll() is not None else p for p in self.processes]
        raise TimeoutError(f"not all nodes are alive after {STARTING:.0f} s, see {self.folder}.log")

    def mend(self) -> None:
        """Starts those anew that were killed."""
        dead = [p for p in self.processes if p.poll() is not None]
        self.processes = [self._start(head=False) if p in dead else p for p in self.processes]
        if dead:
            self._await_all()

    def close(self) -> None:
        for process in reversed(self.processes):
            kill(process)


def kill(process: subprocess.Popen[Any]) -> None:
    """A process and all below it, at once, if it still is."""
    if process.poll() is not None:
        return
    for victim in (*below(process.pid), psutil.Process(process.pid)):
        kill_process(victim)
    process.wait()


def below(pid: int) -> list[psutil.Process]:
    """All processes that this one has started, and theirs."""
    return psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []


def kill_process(victim: psutil.Process) -> None:
    """By SIGKILL, if it still is."""
    with suppress(psutil.NoSuchProcess):
        victim.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def clusters(folder: Path) -> Iterator[dict[int, Nodes]]:
    """By number of nodes, started when asked for."""

    class Lazy(dict[int, Nodes]):
        def __missing__(self, count: int) -> Nodes:
            self[count] = Nodes(count, folder / f"ray{count}")
            return self[count]

    with ExitStack() as stack:
        found = Lazy()
        stack.callback(lambda: [nodes.close() for nodes in found.values()])
        yield found
