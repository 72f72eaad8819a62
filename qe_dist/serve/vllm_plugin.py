"""`quant_method: "qe"` for vLLM, which finds `register` by its entry point `vllm.general_plugins`."""

SUPPORTED = ("0.32",)
"""Versions of vLLM that `make test-vllm` has run with. Layers, parameters and weight loader change between them."""


def register() -> None:
    """Called in every process of vLLM, before a model is made; idempotent.

    RuntimeError where this vLLM is none of those that were tried.
    """
    from vllm import __version__ as found

    if ".".join(found.split(".")[:2]) not in SUPPORTED:
        raise RuntimeError(f"qe_dist serves with vLLM {' or '.join(SUPPORTED)}, found {found}; install one of those")
    from qe_dist.serve import vllm_linear, vllm_media  # noqa: F401 (they register themselves)
