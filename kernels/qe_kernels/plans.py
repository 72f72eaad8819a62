"""Groups and linears as they are served: configurations resolved once, all kernels compiled at the first call.

`dispatch` and `down_config` choose tiles by buckets of tokens, so a plan knows every kernel that it will ever need. Its
first call compiles all of them, at the same time, and allocates the workspace; no later call compiles, whatever its
number of tokens. Inputs are as `ops` describes them; only what would read wrong memory is checked, unless the
environment has QE_KERNELS_CHECK=1.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qe_kernels import checks
from qe_kernels.branches import Branch
from qe_kernels.dense import compile_dense, linear_on_dense_weight
from qe_kernels.dispatch import BUCKETS, Device, bucket_config, choose, key_of, place_of
from qe_kernels.down import Down, Projection
from qe_kernels.factors import Factor
from qe_kernels.launch import compile_all, on
from qe_kernels.layout import Weight, order_for
from qe_kernels.linear import Linear
from qe_kernels.quantize import Activations, Quantizer
from qe_kernels.workspaces import workspace_of

CHECK = os.environ.get("QE_KERNELS_CHECK") == "1"


def expect_aligned(name: str, tensor: Tensor) -> None:
    """ValueError where a tensor from outside is not aligned: kernels were compiled for such that are."""
    if tensor.data_ptr() % checks.ALIGNMENT:
        checks.expect_aligned({name: tensor})


def expect_dtype(name: str, tensor: Tensor, compiled: torch.dtype | None) -> None:
    """ValueError where a tensor from outside is of another type than the one that kernels were compiled for."""
    if tensor.dtype != compiled:
        raise ValueError(f"{name}: expected {compiled}, which its kernels were compiled for, found {tensor.dtype}")


class QuantizePlan:
    def __init__(self, columns: int, **how: Any) -> None:
        """The arguments are those of `Quantizer`."""
        self.quantizer, self.how = Quantizer(columns, **how), how
        self.dtype: torch.dtype | None = None
        """The type of x, once the kernels are compiled."""

    def __call__(self, x: Tensor, modality: Tensor | None = None, expert: Tensor | None = None) -> Activations:
        """See `ops.quantize`."""
        expect_aligned("x", x)
        if CHECK:
            given = {name: value for name, value in self.how.items() if name not in ("eps", "with_x")}
            checks.check_quantize(x, **{**NOTHING, **given}, modality=modality, expert=expert)
        if self.dtype is None:
            self.compile(x, modality, expert)
        expect_dtype("x", x, self.dtype)
        with on(x.device):
            return self.quantizer(x, modality, expert)

    def compile(self, x: Tensor, modality: Tensor | None, expert: Tensor | None) -> None:
        compile_all("quantize", x.device, [partial(self.quantizer.compile, x, modality, expert)])
        self.dtype = x.dtype


NOTHING: dict[str, Any] = {
    "outliers": 0, "gated": False, "norm_weight": None, "input_scale": None, "shared_channels": None,
    "expert_channels": None, "extracted": None, "salient_channels": None,
}  # fmt: skip


class DownPlan:
    def __init__(
        self, device: Device, columns: int, shared: Factor | None, experts: Factor | None, router: Tensor | None = None
    ) -> None:
        """columns: of x; the others as `ops.down` takes them."""
        self.given = (shared, experts, router)
        sizes = [factor[0].shape[:-1].numel() for factor in (shared, experts) if factor is not None]
        rows = sum(sizes) if sizes or router is None else router.shape[:2].numel()
        buckets = (*BUCKETS, BUCKETS[-1] + 1)
        configs = [bucket_config(tokens, rows, columns, device.processors) for tokens in buckets]
        made = {config: Projection(shared, experts, router, columns, config) for config in configs}
        self.projections = [made[config] for config in configs]
        self.dtype: torch.dtype | None = None
        """The type of x, once the kernels are compiled."""

    def __call__(self, x: Tensor, router_x: Tensor | None = None, expert: Tensor | None = None) -> Down:
        """See `ops.down`."""
        expect_aligned("x", x)
        if CHECK:
            shared, experts, router = self.given
            factors = (*(shared or (None, None)), *(experts or (None, None)))
            names = ("shared", "shared_scale", "experts", "experts_scale")
            named = dict(zip(names, factors, strict=True))
            checks.check_down(x, **named, router=router, router_x=router_x, expert=expert)
        if self.dtype is None:
            self.compile(x, router_x, expert)
        expect_dtype("x", x, self.dtype)
        with on(x.device):
            return self.projections[place_of(len(x))](x, router_x, expert, workspace_of(x.device))

    def compile(self, x: Tensor, router_x: Tensor | None, expert: Tensor | None) -> None:
        given = (x, router_x, expert, workspace_of(x.device))
        jobs = [partial(one.compile, *given) for one in dict.fromkeys(self.projections)]
        compile_all("down", x.device, jobs)
        self.dtype = x.dtype


class LinearPlan:
    def __init__(self, device: Device, weight: Weight, branches: Sequence[Branch], out_dtype: torch.dtype) -> None:
        """branches: with any z of the right dtype and width."""
        self.device, self.weight, self.out_dtype = device, weight, out_dtype
        self.branches = [replace(branch, z=branch.z.new_empty((1, *branch.z.shape[1:]))) for branch in branches]
        configs = [choose(device, weight, tokens) for tokens in (*BUCKETS, BUCKETS[-1] + 1)]
        made = {config: Linear(weight, branches, config, out_dtype) for config in configs if config}
        self.linears = [None if config is None else made[config] for config in configs]
        self.ready = False

    def __call__(
        self, base: Tensor, token_scale: Tensor | None, zs: Sequence[Tensor], expert: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """y [M, N]; see `ops.linear`. zs: of the branches."""
        expect_aligned("base", base)
        if CHECK:
            branches, order = self._with(zs), order_for(self.device.capability)
            checks.check_linear(base, token_scale, self.weight, branches, expert, bias, self.out_dtype, order)
        if not self.ready:
            self.compile(base, token_scale, zs, expert, bias)
        linear = self.linears[place_of(len(base))]
        with on(base.device):
            if linear is not None:
                return linear(base, token_scale, zs, expert, bias, workspace_of(base.device))
            arguments = (base, token_scale, self.weight, self._with(zs), expert, bias)
            return linear_on_dense_weight(*arguments, out_dtype=self.out_dtype)

    def compile(
        self, base: Tensor, token_scale: Tensor | None, zs: Sequence[Tensor], expert: Tensor | None, bias: Tensor | None
    ) -> None:
        given = (base, token_scale, zs, expert, bias, workspace_of(base.device))
        linears = [one for one in dict.fromkeys(self.linears) if one is not None]
        jobs = [partial(one.compile, *given) for one in linears]
        if None in self.linears:
            jobs.append(partial(compile_dense, self.weight, self.branches, self.out_dtype))
        compile_all(key_of(self.weight), base.device, jobs)
        self.ready = True

    def _with(self, zs: Sequence[Tensor]) -> list[Branch]:
        return [Branch(z, of.up, of.experts) for z, of in zip(zs, self.branches, strict=True)]


_compiled: set[Hashable] = set()


def compile_once(kind: str, tensors: Sequence[Tensor | None], how: Hashable, compile_them: Callable[[], None]) -> None:
    """For the ops, which keep no plan: the kernels of all numbers of tokens at the first call with inputs like these.

    tensors: by dtype and shape, the first dimension left out of those that have a row for each token.
    """
    like = tuple(None if t is None else (t.device, t.dtype, t.shape[1:] if t.dim() > 1 else None) for t in tensors)
    if (kind, like, how) not in _compiled:
        compile_them()
        _compiled.add((kind, like, how))
