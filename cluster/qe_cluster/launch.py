"""A Ray cluster to run on: the one that is given, or one started here and stopped again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from qe_dist.core.errors import ConfigError


@contextmanager
def ray_cluster(address: str | None, cpus: int) -> Iterator[None]:
    """Connects to `address`, or starts Ray in this process's care with at least `cpus` CPU slots."""
    if ray.is_initialized():  # by the caller, who keeps it
        yield
        return
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"no Ray cluster answers at {address}: {error}") from None
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


def num_gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def default_workers(threads: int) -> int:
    """One per GPU; without any, one per CPU slot but at most four."""
    cpus = int(ray.cluster_resources().get("CPU", 1))
    return num_gpus() or max(1, min(4, cpus // threads))


def default_device() -> str:
    return "cuda" if num_gpus() else "cpu"
