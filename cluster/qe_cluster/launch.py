"""A Ray cluster to run on: the one that is given, or one started here and stopped again."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from qe_dist.core.errors import ConfigError


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
    if address is None:
        import torch

        return Resources(os.cpu_count() or 1, torch.cuda.device_count())
    with ray_cluster(address, 1):
        found = ray.cluster_resources()
    return Resources(int(found.get("CPU", 1)), int(found.get("GPU", 0)))


@contextmanager
def ray_cluster(address: str | None, cpus: int) -> Iterator[None]:
    """Connects to `address`, or starts Ray in this process's care with at least `cpus` CPU slots."""
    if ray.is_initialized():  # by the caller, who keeps it
        yield
        return
    if address is not None:
        _knock(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {address}: {error}. If it wants a token, set RAY_AUTH_MODE=token"
            ) from None
    else:
        ray.init(
            address="local",
            num_cpus=max(cpus, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Ray ends the whole process when nobody listens at HOST:PORT, so this is tried first."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {error}") from None
