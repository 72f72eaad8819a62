"""`quant_method: "qe"` for vLLM, which finds `register` by its entry point `vllm.general_plugins`."""

from importlib.metadata import packages_distributions, version

from qe_dist.core.errors import ConfigError

SUPPORTED = ("0.32",)
"""Versions of vLLM that `make test-vllm` has run with. Layers, parameters and weight loader change between them."""


def register() -> None:
    """Called in every process of vLLM, before a model is made; idempotent.

    ConfigError where this vLLM is none of those that were tried.
    """
    from vllm import __version__ as found

    check_supported(found)
    from qe_dist.serve import vllm_linear  # noqa: F401 (it registers itself)
    from qe_dist.serve.http import vllm_media  # noqa: F401


def check_installed() -> None:
    """ConfigError where no vLLM is installed that was tried. Imports nothing of it."""
    distributions = packages_distributions().get("vllm")  # builds for CPUs alone have another name
    if not distributions:
        raise ConfigError(f"vLLM is not installed; qe_dist serves with vLLM {' or '.join(SUPPORTED)}")
    check_supported(version(distributions[0]))


def check_supported(found: str) -> None:
    """ConfigError where this version of vLLM was not tried."""
    if ".".join(found.split(".")[:2]) not in SUPPORTED:
        raise ConfigError(f"qe_dist serves with vLLM {' or '.join(SUPPORTED)}, found {found}; install one of those")
