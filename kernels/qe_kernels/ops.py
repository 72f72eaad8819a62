"""The public calls: checked, dispatched, and visible to torch.compile and CUDA graphs as the custom ops `qe::*`.

Custom ops take and return tensors and numbers only, so each call takes its arguments apart and puts the results
together; torch.compile traces both. Where the kernels know the GPU they run; on any other device the references do.

    activations = quantize(x, bits=8, int8=True)
    prologue = down(activations.x, shared=(a_s, None), experts=(a_e, None), router=router, router_x=x)
    branches = [Branch(prologue.shared_z, b_s), Branch(prologue.expert_z, b_e, experts=8)]        b: of pack_up
    y = linear(activations.base, activations.token_scale, weight, branches, prologue.expert[0])
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qe_kernels import checks
from qe_kernels.branches import Branch, Up
from qe_kernels.dense import linear_on_dense_weight
from qe_kernels.dispatch import bucket_config, choose, device_of, key_of
from qe_kernels.down import Down, down_reference
from qe_kernels.down import down as down_kernel
from qe_kernels.factors import Factor, padded_columns
from qe_kernels.launch import on
from qe_kernels.layout import Order, Weight, order_for
from qe_kernels.linear import linear as linear_kernel
from qe_kernels.linear import linear_reference
from qe_kernels.plans import DownPlan, LinearPlan, compile_once
from qe_kernels.quantize import Activations, new_tensors
from qe_kernels.quantize import quantize as quantize_kernel
from qe_kernels.quantize_reference import quantize_reference
from qe_kernels.rotate import rotate as rotate_by_products
from qe_kernels.workspaces import workspace_of


def quantize(
    x: Tensor,
    *,
    bits: int | None,
    outliers: int = 0,
    int8: bool,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
    input_scale: Tensor | None = None,
    modality: Tensor | None = None,
    shared_channels: Tensor | None = None,
    expert_channels: Tensor | None = None,
    expert: Tensor | None = None,
    extracted: Tensor | None = None,
    salient_channels: Tensor | None = None,
    with_x: bool = True,
) -> Activations:
    """See `qe_kernels.quantize.quantize`. Raises ValueError, naming the tensor, if one does not fit."""
    new = new_tensors(bits, outliers, norm_weight, gated, input_scale, extracted, with_x)
    made = iter(
        _quantize(
            x, bits, outliers, int8, norm_weight, eps, gated, input_scale, modality, shared_channels, expert_channels,
            expert, extracted, salient_channels, with_x,
        )
    )  # fmt: skip
    prepared = next(made) if new.x else x
    return Activations(
        prepared if with_x else None,
        next(made) if new.base else prepared,
        next(made) if new.token_scale else None,
        *(
            None if channels is None else next(made)
            for channels in (shared_channels, expert_channels, salient_channels)
        ),
    )


def rotate(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """See `qe_kernels.rotate.rotate`. Raises ValueError, naming the tensor, if one does not fit."""
    return _rotate(x, list(factors))


def down(
    x: Tensor,
    shared: Factor | None = None,
    experts: Factor | None = None,
    router: Tensor | None = None,
    router_x: Tensor | None = None,
    expert: Tensor | None = None,
) -> Down:
    """See `qe_kernels.down.down`. Raises ValueError, naming the tensor, if one does not fit."""
    made = iter(_down(x, *(shared or (None, None)), *(experts or (None, None)), router, router_x, expert))
    return Down(
        None if shared is None else next(made),
        None if experts is None else next(made),
        None if router is None else next(made),
    )


def route(router: Tensor, x: Tensor) -> Tensor:
    """int32 [T, M]: the experts that T routers [T, E, H] choose for x [M, H]; -1 where every score is NaN."""
    expert = down(x, router=router, router_x=x).expert
    assert expert is not None  # there is a router
    return expert


def linear(
    base: Tensor,
    token_scale: Tensor | None,
    weight: Weight,
    branches: Sequence[Branch] = (),
    expert: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y [M, N], see `qe_kernels.linear`; `out_dtype` is that of `base` unless said.

    Raises ValueError, naming the tensor, if one does not fit.
    """
    return _linear(
        base,
        token_scale,
        list(weight.planes),
        weight.scale,
        weight.rows,
        weight.columns,
        weight.bits,
        weight.group_size,
        weight.order.value,
        weight.int8,
        [branch.z for branch in branches],
        [branch.up.planes[0] if isinstance(branch.up, Weight) else branch.up for branch in branches],
        [branch.up.scale if isinstance(branch.up, Weight) else None for branch in branches],
        [branch.up.bits if isinstance(branch.up, Weight) else 16 for branch in branches],
        [branch.experts or 0 for branch in branches],
        expert,
        bias,
        out_dtype or base.dtype,
    )


@torch.library.custom_op("qe::quantize", mutates_args=())
def _quantize(
    x: Tensor,
    bits: int | None,
    outliers: int,
    int8: bool,
    norm_weight: Tensor | None,
    eps: float,
    gated: bool,
    input_scale: Tensor | None,
    modality: Tensor | None,
    shared_channels: Tensor | None,
    expert_channels: Tensor | None,
    expert: Tensor | None,
    extracted: Tensor | None,
    salient_channels: Tensor | None,
    with_x: bool,
) -> list[Tensor]:
    given: dict[str, Any] = {
        "norm_weight": norm_weight, "input_scale": input_scale, "modality": modality,
        "shared_channels": shared_channels, "expert_channels": expert_channels, "expert": expert,
        "extracted": extracted, "salient_channels": salient_channels,
    }  # fmt: skip
    how: dict[str, Any] = {"bits": bits, "outliers": outliers, "int8": int8, "gated": gated}
    checks.check_quantize(x, **how, **given)
    if device_of(x.device) is None:
        made = quantize_reference(x, **how, **given, eps=eps, with_x=with_x)
    else:
        of_tokens = ("expert", "modality")  # perhaps a part of a longer list
        checks.expect_aligned({"x": x} | {name: t for name, t in given.items() if name not in of_tokens})
        with on(x.device):
            made = quantize_kernel(x, **how, **given, eps=eps, with_x=with_x)
    new = new_tensors(bits, outliers, norm_weight, gated, input_scale, extracted, with_x)
    prepared = made.base if made.x is None else made.x
    first = ((prepared, new.x), (made.base, new.base), (made.token_scale, new.token_scale))
    gathered = (made.shared_z, made.expert_z, made.salient_z)
    return [t for t, is_new in first if is_new and t is not None] + [t for t in gathered if t is not None]


@_quantize.register_fake
def _(x, bits, outliers, int8, norm_weight, eps, gated, input_scale, modality, shared_channels, expert_channels, expert,
      extracted, salient_channels, with_x):  # fmt: skip
    checks.check_quantize(
        x, bits=bits, outliers=outliers, int8=int8, gated=gated, norm_weight=norm_weight, input_scale=input_scale,
        modality=modality, shared_channels=shared_channels, expert_channels=expert_channels, expert=expert,
        extracted=extracted, salient_channels=salient_channels,
    )  # fmt: skip
    tokens, columns = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    new = new_tensors(bits, outliers, norm_weight, gated, input_scale, extracted, with_x)
    made = [x.new_empty(tokens, columns)] if new.x else []
    if new.base:
        made.append(x.new_empty(tokens, columns, dtype=torch.int8 if int8 else x.dtype))
    if new.token_scale:
        made.append(x.new_empty(tokens, dtype=torch.float32))
    lists = (shared_channels, expert_channels, salient_channels)
    return made + [x.new_empty(tokens, channels.shape[-1]) for channels in lists if channels is not None]


@torch.library.custom_op("qe::rotate", mutates_args=())
def _rotate(x: Tensor, factors: list[Tensor]) -> Tensor:
    checks.check_rotate(x, factors)
    return rotate_by_products(x, factors)


@_rotate.register_fake
def _(x, factors):
    checks.check_rotate(x, factors)
    return torch.empty_like(x)


@torch.library.custom_op("qe::down", mutates_args=())
def _down(
    x: Tensor,
    shared: Tensor | None,
    shared_scale: Tensor | None,
    experts: Tensor | None,
    experts_scale: Tensor | None,
    router: Tensor | None,
    router_x: Tensor | None,
    expert: Tensor | None,
) -> list[Tensor]:
    given: dict[str, Any] = {
        "x": x,
        "shared": shared,
        "experts": experts,
        "router": router,
        "router_x": router_x,
        "expert": expert,
    }
    checks.check_down(**given, shared_scale=shared_scale, experts_scale=experts_scale)
    one = None if shared is None else (shared, shared_scale)
    many = None if experts is None else (experts, experts_scale)
    device = device_of(x.device)
    if device is None:
        made = down_reference(x, one, many, router, router_x, expert)
    else:
        checks.expect_aligned({name: tensor for name, tensor in given.items() if name != "expert"})
        sizes = [values.shape[:-1].numel() for values in (shared, experts) if values is not None]
        rows = sum(sizes) if sizes or router is None else router.shape[:2].numel()
        config = bucket_config(x.shape[0], rows, x.shape[1], device.processors)
        compile_once(
            "down", (*given.values(), shared_scale, experts_scale), rows,
            lambda: DownPlan(device, x.shape[1], one, many, router).compile(x, router_x, expert),
        )  # fmt: skip
        with on(x.device):
            workspace = workspace_of(x.device)
            made = down_kernel(x, one, many, router, router_x, expert, config=config, workspace=workspace)
    return [tensor for tensor in (made.shared_z, made.expert_z, made.expert) if tensor is not None]


@_down.register_fake
def _(x, shared, shared_scale, experts, experts_scale, router, router_x, expert):
    checks.check_down(
        x, shared=shared, shared_scale=shared_scale, experts=experts, experts_scale=experts_scale, router=router,
        router_x=router_x, expert=expert,
    )  # fmt: skip
    tokens, made = x.shape[0], []
    if shared is not None:
        made.append(x.new_empty(tokens, shared.shape[0]))
    if experts is not None:
        made.append(x.new_empty(tokens, *experts.shape[:2]))
    if router is not None:
        made.append(x.new_empty(router.shape[0], tokens, dtype=torch.int32))
    return made


@torch.library.custom_op("qe::linear", mutates_args=())
def _linear(
    base: Tensor,
    token_scale: Tensor | None,
    planes: list[Tensor],
    scale: Tensor,
    rows: int,
    columns: int,
    bits: int,
    group_size: int | None,
    order: str,
    int8: bool,
    z: list[Tensor],
    up: list[Tensor],
    up_scale: list[Tensor | None],
    up_bits: list[int],
    experts: list[int],
    expert: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    weight = Weight(tuple(planes), scale, rows, columns, bits, group_size, Order(order), int8)
    branches = _branches(weight, z, up, up_scale, up_bits, experts)
    device = device_of(base.device)
    wanted = None if device is None else order_for(device.capability)
    checks.check_linear(base, token_scale, weight, branches, expert, bias, out_dtype, wanted)
    arguments = (base, token_scale, weight, branches, expert, bias)
    if device is None:
        return linear_reference(*arguments, out_dtype=out_dtype)
    checks.expect_aligned(dict(_named(base, weight, branches)))
    config = choose(device, weight, base.shape[0])
    compile_once(
        "linear", (base, token_scale, expert, bias, *z, *up, *up_scale),
        (key_of(weight), weight.scale.dtype, out_dtype, *up_bits, *experts),
        lambda: LinearPlan(device, weight, branches, out_dtype).compile(base, token_scale, z, expert, bias),
    )  # fmt: skip
    with on(base.device):
        if config is None:
            return linear_on_dense_weight(*arguments, out_dtype=out_dtype)
        return linear_kernel(*arguments, out_dtype=out_dtype, config=config, workspace=workspace_of(base.device))


@_linear.register_fake
def _(base, token_scale, planes, scale, rows, columns, bits, group_size, order, int8, z, up, up_scale, up_bits,
      experts, expert, bias, out_dtype):  # fmt: skip
    weight = Weight(tuple(planes), scale, rows, columns, bits, group_size, Order(order), int8)
    branches = _branches(weight, z, up, up_scale, up_bits, experts)
    checks.check_linear(base, token_scale, weight, branches, expert, bias, out_dtype, order=None)
    return base.new_empty(base.shape[0], rows, dtype=out_dtype)


def _branches(
    weight: Weight, zs: list[Tensor], ups: list[Tensor], scales: list[Tensor | None], bits: list[int],
    experts: list[int],
) -> list[Branch]:  # fmt: skip
    """Put together again."""
    made = []
    for z, values, scale, width, count in zip(zs, ups, scales, bits, experts, strict=True):
        up: Up = values
        if scale is not None:
            columns = padded_columns(z.shape[-1] * (count or 1))
            group = z.shape[-1] if count else None
            up = Weight((values,), scale, weight.rows, columns, width, group, weight.order, int8=False)
        made.append(Branch(z, up, count or None))
    return made


def _named(base: Tensor, weight: Weight, branches: Sequence[Branch]) -> Iterator[tuple[str, Tensor]]:
    yield "base", base
    yield from ((f"weight.planes[{i}]", plane) for i, plane in enumerate(weight.planes))
    for i, branch in enumerate(branches):
        up = branch.up.planes[0] if isinstance(branch.up, Weight) else branch.up
        yield from ((f"branches[{i}].z", branch.z), (f"branches[{i}].up", up))
