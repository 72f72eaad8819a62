"""A Ray cluster to run on: connects to the one that is given, or starts one on this machine and stops it again."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qe_cluster.ending import ending_with_cluster
from qe_dist.core.errors import ConfigError, TemporaryError

PROBE_SECONDS = 900
"""A node has this long to start one worker process, which may have to fetch the job's packages first."""
TRIES = 3
"""Ray gives up after 30 s what it starts, and after 5 s what does not answer. A busy machine needs longer."""
PATIENT = {
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_worker_niceness": "0",
}
"""Settings of a Ray that we start. With its own it ends a worker process that is not there after 60 s, and workers run
at nice 15: beside other work that takes all cores they get 3 % of a core."""
TRIES_VARIABLE = "RAY_gcs_server_port_wait_time_s"
"""How often Ray asks a head node that does not answer: by default twenty times, even when it refused to connect."""
TOKEN_HELP = (
    "set RAY_AUTH_MODE=token, and give the cluster's token in RAY_AUTH_TOKEN or in the file ~/.ray/auth_token "
    "(on its head node `ray get-auth-token` prints it)"
)


@dataclass(frozen=True)
class Resources:
    """CPU slots and GPUs that a run may use."""

    cpus: int
    gpus: int

    def workers(self, threads: int) -> int:
        """Default number of workers: one per GPU; without a GPU one per `threads` CPU slots, at most four."""
        return self.gpus or max(1, min(4, self.cpus // threads))

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


def resources(address: str | None) -> Resources:
    """The resources of the cluster at `address` or in RAY_ADDRESS, else of this machine. Starts nothing.

    Raises ConfigError as `ray_cluster` does.
    """
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
    job), or starts Ray on this machine and stops it at the end.

    cpus, object_store_memory: for a cluster that is started here, the least number of CPU slots and the bytes of the
    object store (Ray wants 75 MiB or more; default: 30 % of free memory).

    Raises ConfigError when the cluster does not answer, refuses our token, or has other versions than this process.
    """
    address = cluster_address(address)
    if ray.is_initialized():  # by the caller, who keeps it
        yield
    elif address is not None:
        with _connected(address), ending_with_cluster():
            _check_nodes()
            yield
    else:
        _start(cpus, object_store_memory)
        try:
            with ending_with_cluster():
                yield
        finally:
            ray.shutdown()


def cluster_address(address: str | None) -> str | None:
    """Returns `address`, else RAY_ADDRESS, else None: then a cluster is started on this machine."""
    return address or os.environ.get("RAY_ADDRESS")


def _start(cpus: int, object_store_memory: int | None) -> None:
    """Starts Ray on this machine. Such a cluster asks for a token, which Ray makes when there is none."""
    here = _here()
    options = {
        "num_cpus": max(cpus, here.cpus),
        "num_gpus": here.gpus,
        "object_store_memory": object_store_memory,
        "include_dashboard": False,
    }
    for tries in range(1, TRIES + 1):
        try:
            return _init("local", PATIENT, **options)
        except ValueError:
            raise
        except Exception as error:  # Ray raises bare ones for what is late
            if isinstance(error, OSError) and not isinstance(error, (TimeoutError, ConnectionError)):
                raise ConfigError(
                    f"Ray could not start: {error}. It keeps its token in ~/.ray/auth_token and its session in "
                    "/tmp/ray: both must be writable, or name other places in RAY_AUTH_TOKEN_PATH and RAY_TMPDIR"
                ) from None
            if tries == TRIES:
                raise TemporaryError(
                    f"Ray did not start in {TRIES} tries: {error} Its logs are in /tmp/ray/session_latest/logs; if "
                    "this machine is busy, type the same command again"
                ) from None


@contextmanager
def _connected(address: str) -> Iterator[None]:
    for tries in range(1, TRIES + 1):
        _check_address(address)
        try:
            _init(address, {TRIES_VARIABLE: "1"})
            break
        except (OSError, ValueError, RuntimeError, RayError) as error:
            said = f"{error} {error.__cause__ or ''}"
            if tries == TRIES or _refuses(said):
                raise ConfigError(_connection_error(address, said)) from None
    try:
        yield
    finally:
        ray.shutdown()


def _init(address: str, environment: Mapping[str, str], **options: Any) -> None:
    """Starts or joins a cluster, with these variables of the environment unless they are set. Leaves nothing behind
    when that fails."""
    added = {name: value for name, value in environment.items() if name not in os.environ}
    os.environ.update(added)
    try:
        with _our_settings():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except BaseException:
        ray.shutdown()
        raise
    finally:
        for name in added:  # another cluster may need Ray's default
            del os.environ[name]


@contextmanager
def _our_settings() -> Iterator[None]:
    """Keeps our handler of SIGTERM while Ray connects: Ray's own ends the process at once. Keeps Ray from printing the
    errors of batches that were on their way to a worker that died, which the driver handles."""
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _check_address(address: str) -> None:
    """Raises ConfigError when nothing listens at HOST:PORT: Ray would wait for minutes and then end this process."""
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


def _refuses(message: str) -> bool:
    """Whether Ray says that it will never answer us."""
    return "authentication token" in message.lower() or "Version mismatch" in message


def _connection_error(address: str, message: str) -> str:
    """Our message for a cluster that cannot be used, from the message of Ray."""
    if "authentication token" in message.lower():
        return f"the Ray cluster at {address} wants a token that we do not have: {TOKEN_HELP}"
    if "Version mismatch" in message:
        return f"the Ray cluster at {address} is not of our version: {' '.join(message.split())}"
    return f"no Ray cluster answers at {address}: {message.strip().splitlines()[-1]}"


def _check_nodes() -> None:
    """Raises ConfigError when a node has other versions than this process: its bytes could differ."""

    def versions() -> str:  # nested, so that Ray sends its code; a function of a module is sent by name
        from importlib.metadata import version

        try:
            from qe_dist import __version__

            return f"qe_dist {__version__}, torch {version('torch').partition('+')[0]}"
        except ImportError as error:
            return str(error)

    def ask(node: dict[str, Any]) -> ray.ObjectRef:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return ray.remote(versions).options(num_cpus=0, scheduling_strategy=there).remote()

    asked = {ask(node): node for node in ray.nodes() if node["Alive"]}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_SECONDS)
    ours = versions()
    for question, node in asked.items():
        where = node["NodeManagerAddress"]
        if question not in answered:
            raise TemporaryError(
                f"node {where} of the Ray cluster started no worker in {PROBE_SECONDS} s; see what keeps it busy, or "
                "take it out of the cluster, and type the same command again"
            )
        try:
            theirs = ray.get(question)
        except RayError as error:
            if not _is_alive(node["NodeID"]):
                continue  # lost meanwhile, so no worker will be there
            raise ConfigError(f"node {where} of the Ray cluster cannot start a worker: {error}") from None
        if theirs != ours:
            raise ConfigError(
                f"all nodes must have the same code, for the same bytes: this process has {ours}, node {where}: "
                f"{theirs}. Install it there, or send ours along by qe-dist submit"
            )


def _is_alive(node: str) -> bool:
    return any(known["NodeID"] == node and known["Alive"] for known in ray.nodes())
