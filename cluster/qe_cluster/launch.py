"""A Ray cluster to run on: the one that is given, or one started here and stopped again."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qe_dist.core.errors import ConfigError

PROBE_SECONDS = 120
"""For a node to start one worker process, which may have to fetch the job's packages first."""
TRIES = "RAY_gcs_server_port_wait_time_s"
"""How often Ray asks a head node that does not answer. By default twenty times, even where it answered "no"."""
TOKEN_HELP = (
    "set RAY_AUTH_MODE=token, and give the cluster's token in RAY_AUTH_TOKEN or in the file ~/.ray/auth_token "
    "(on its head node `ray get-auth-token` prints it)"
)


@dataclass(frozen=True)
class Resources:
    """What a run can count on."""

    cpus: int
    gpus: int

    def workers(self, threads: int) -> int:
        """One per GPU; without any, one per CPU slot but at most four."""
        return self.gpus or max(1, min(4, self.cpus // threads))

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


def resources(address: str | None) -> Resources:
    """Of the given cluster, or of this machine (without starting anything)."""
    address = cluster_address(address)
    if address is None:
        return _here()
    with _connected(address):
        found = ray.cluster_resources()
    return Resources(int(found.get("CPU", 1)), int(found.get("GPU", 0)))


def _here() -> Resources:
    import torch

    return Resources(os.cpu_count() or 1, torch.cuda.device_count())


@contextmanager
def ray_cluster(address: str | None, cpus: int, object_store_memory: int | None = None) -> Iterator[None]:
    """Connects to the cluster at `address` (without one, to that of RAY_ADDRESS, which is set inside a submitted
    job), or starts Ray in this process's care.

    cpus, object_store_memory: at least so many CPU slots, and the size in bytes of the object store (Ray wants 75 MiB
    or more; default: 30 % of what is free). For a cluster that is started here; one that is given has its own.

    Raises ConfigError where the cluster does not answer, refuses our token, or has other versions than we do.
    """
    address = cluster_address(address)
    if ray.is_initialized():  # by the caller, who keeps it
        yield
    elif address is not None:
        with _connected(address):
            _check_nodes()
            yield
    else:
        _start(cpus, object_store_memory)
        try:
            yield
        finally:
            ray.shutdown()


def cluster_address(address: str | None) -> str | None:
    """The cluster that is meant: the one that is named, that of RAY_ADDRESS, or None for one to be started here."""
    return address or os.environ.get("RAY_ADDRESS")


def _start(cpus: int, object_store_memory: int | None) -> None:
    """Ray makes such a cluster ask for a token, and makes the token where there is none."""
    here = _here()
    try:
        with _as_we_want_it():
            ray.init(
                address="local",
                num_cpus=max(cpus, here.cpus),
                num_gpus=here.gpus,
                object_store_memory=object_store_memory,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
    except OSError as error:
        raise ConfigError(
            f"Ray could not start: {error}. It keeps its token in ~/.ray/auth_token and its session in /tmp/ray: both "
            "must be writable, or name other places in RAY_AUTH_TOKEN_PATH and RAY_TMPDIR"
        ) from None


@contextmanager
def _connected(address: str) -> Iterator[None]:
    _knock(address)
    given = os.environ.setdefault(TRIES, "1")
    try:
        with _as_we_want_it():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError, RayError) as error:
        ray.shutdown()  # what had been begun
        raise ConfigError(_refusal(address, f"{error} {error.__cause__ or ''}")) from None
    finally:
        if given == "1":  # a cluster that this process starts later has its own patience
            del os.environ[TRIES]
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _as_we_want_it() -> Iterator[None]:
    """Ray puts a handler for SIGTERM in the place of ours, which ends the process at once. And it prints the errors of
    every batch that was on its way to a worker that died, which the driver deals with."""
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _knock(address: str) -> None:
    """Ray waits for minutes, and then ends the whole process, when nobody listens at HOST:PORT."""
    if "://" in address:
        raise ConfigError(
            f"a run cannot join {address}: name HOST:PORT as `ray start` prints it, on a machine of the cluster; "
            "from another machine, use qe-dist submit"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {error}") from None


def _refusal(address: str, said: str) -> str:
    """Why the cluster cannot be used, from what Ray says of it."""
    if "authentication token" in said.lower():
        return f"the Ray cluster at {address} wants a token that we do not have: {TOKEN_HELP}"
    if "Version mismatch" in said:
        return f"the Ray cluster at {address} is not of our version: {' '.join(said.split())}"
    return f"no Ray cluster answers at {address}: {said.strip().splitlines()[-1]}"


def _check_nodes() -> None:
    """The same bytes from every node need the same code on every node."""

    def versions() -> str:  # in here, it is sent as it is; functions of modules are sent by name
        from importlib.metadata import version

        try:
            from qe_dist import __version__

            return f"qe_dist {__version__}, torch {version('torch').partition('+')[0]}"
        except ImportError as error:
            return str(error)

    def ask(node: dict[str, Any]) -> ray.ObjectRef:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return ray.remote(versions).options(num_cpus=0, scheduling_strategy=there).remote()

    asked = {ask(node): node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_SECONDS)
    ours = versions()
    for question, node in asked.items():
        if question not in answered:
            raise ConfigError(f"node {node} of the Ray cluster started no worker in {PROBE_SECONDS} s")
        try:
            theirs = ray.get(question)
        except RayError as error:
            raise ConfigError(f"node {node} of the Ray cluster cannot start a worker: {error}") from None
        if theirs != ours:
            raise ConfigError(
                f"all nodes must have the same code, for the same bytes: this process has {ours}, node {node}: "
                f"{theirs}. Install it there, or send ours along by qe-dist submit"
            )
