"""`quant_method: "qe"` for vLLM, which finds this module by its entry point `vllm.general_plugins`.

`register` is called in every process of vLLM, before a model is made; it imports `vllm_linear`, which is the plug-in.
"""

from importlib.metadata import version

OLDEST, NEWEST = (0, 32), (0, 33)
"""Whose linear layers, parameters and weight loader the plug-in was written for."""


def register() -> None:
    """Idempotent. RuntimeError where this vLLM is too old or too new."""
    from vllm import __version__ as found

    if not OLDEST <= _minor(found) <= NEWEST:
        span = f"{_shown(OLDEST)} to {_shown(NEWEST)}"
        raise RuntimeError(f"qe_dist {version('qe_dist')} serves with vLLM {span}, found {found}; install one of those")
    from qe_dist.serve import vllm_linear  # noqa: F401 (registers itself)


def _minor(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _shown(one: tuple[int, int]) -> str:
    return f"{one[0]}.{one[1]}"
