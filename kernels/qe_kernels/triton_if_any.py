"""Triton, or a stand-in where it is not installed: the kernels then cannot be launched, the references run."""

from typing import Any


class _Missing:
    """Decorates, annotates and is called without effect."""

    def __getattr__(self, name: str) -> "_Missing":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Missing":
        return self


try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = tl = _Missing()

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels are interpreted, on the CPU: decided when Triton is imported."""

__all__ = ["INTERPRET", "tl", "triton"]
