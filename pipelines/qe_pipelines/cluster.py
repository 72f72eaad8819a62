"""Where a command computes: this machine, or a Ray cluster that an option or RAY_ADDRESS names."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qe_dist.core.errors import ConfigError
from qe_pipelines.terminal import say

if TYPE_CHECKING:
    from qe_cluster.launch import Resources

GPU_FILES = ("dev/nvidia*", "dev/dxg", "dev/nvgpu*", "dev/nvhost-gpu")
"""One of these is there where Linux has a GPU that CUDA can use."""


def place(ray_address: str | None, devices: Mapping[str, str | None]) -> tuple[str | None, "Resources"]:
    """The address of the cluster to join (None: this machine alone), and what is there.

    devices: what options ask for, by their names. Raises ConfigError for devices that are not there, and when no
    cluster answers.
    """
    address = joined(ray_address)
    for option, device in devices.items():
        check_device(option, device, address)
    here = resources(address, ray_address)
    for option, device in devices.items():
        check_gpus(option, device, here, address)
    return address, here


def joined(address: str | None) -> str | None:
    """The address of the cluster to join; None for this machine alone. Says so where RAY_ADDRESS alone names one."""
    named = os.environ.get("RAY_ADDRESS")
    if address is None and named:
        say(f"RAY_ADDRESS is set: joining the Ray cluster at {named}; unset it to run on this machine alone")
    return address or named or None


def resources(address: str | None, given: str | None) -> "Resources":
    """What the cluster at an address, or this machine, has.

    address: as `joined` returns it. given: what the option says. Raises ConfigError when no cluster answers there.
    """
    from qe_cluster import launch

    try:
        return launch.resources(address)
    except ConfigError as error:
        if address is None or given is not None:
            raise
        raise ConfigError(f"{error}. RAY_ADDRESS names it: unset it to run on this machine, or start it") from None


def check_device(option: str, device: str | None, address: str | None, root: Path = Path("/")) -> None:
    """ConfigError for CUDA on a machine without a GPU, before anything that takes seconds is imported."""
    if device != "cuda" or address is not None or not sys.platform.startswith("linux"):
        return
    if not any(path for pattern in GPU_FILES for path in root.glob(pattern)):
        raise ConfigError(
            f"{option} cuda: this machine has no NVIDIA GPU (there is no /dev/nvidia*); leave the option out, or name "
            "a Ray cluster that has some by --ray-address"
        )


def check_gpus(option: str, device: str | None, here: "Resources", address: str | None) -> None:
    """ConfigError where there is a GPU that torch cannot use."""
    if device == "cuda" and address is None and not here.gpus:
        import torch

        raise ConfigError(
            f"{option} cuda: torch {torch.__version__} sees no GPU here (cuda.device_count() is 0): is it a build for "
            "CPUs, is CUDA_VISIBLE_DEVICES empty, or is the driver missing?"
        )
