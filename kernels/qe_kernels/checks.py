"""What the ops refuse, before anything is launched: a ValueError that names the tensor, what was expected and found.

Letters: M tokens, K inputs, N outputs, R rank, E experts, D channels that an expert extracts, C those of the shared
one, S salient ones, T routers, H router inputs.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qe_kernels.branches import MAX_EXPERTS, Branch
from qe_kernels.dispatch import depths
from qe_kernels.factors import padded_columns, padded_rank
from qe_kernels.layout import TILE_COLUMNS, TILE_ROWS, Order, Weight, field_widths

FLOATS = (torch.bfloat16, torch.float16)
SCALES = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = (torch.int32, torch.int64)
FACTORS = (torch.bfloat16, torch.float16, torch.int8, torch.uint8)
"""Types of a factor: 16 bits, int8, or two 4-bit codes in each byte (uint8)."""
MAX_WIDTH = 32768
"""Channels of a token that the quantizer holds in registers."""
ALIGNMENT = 16
"""Bytes of a vector load."""


def expect(
    name: str,
    tensor: Tensor,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | None],
    device: torch.device,
) -> None:
    """ValueError unless the tensor is one of `dtypes`, has this shape (None: any length), and is contiguous there."""
    dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    fits = tensor.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
    if tensor.dtype in dtypes and fits and tensor.device == device and tensor.is_contiguous():
        return
    wanted = ", ".join("any" if n is None else str(n) for n in shape)
    kinds = " or ".join(_short(dtype) for dtype in dtypes)
    raise ValueError(
        f"{name}: expected contiguous {kinds} [{wanted}] on {device}, found "
        f"{'' if tensor.is_contiguous() else 'strided '}{_short(tensor.dtype)} {list(tensor.shape)} on {tensor.device}"
    )


def expect_aligned(tensors: Mapping[str, Tensor | None]) -> None:
    """ValueError unless each tensor starts where a vector load may; for real tensors only."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"{name}: expected memory aligned to {ALIGNMENT} bytes, found an offset of "
                f"{tensor.data_ptr() % ALIGNMENT}; clone the tensor"
            )


def check_rotate(x: Tensor, factors: Sequence[Tensor]) -> None:
    expect("x", x, (*FLOATS, torch.float32), (None, None), x.device)
    if not factors:
        raise ValueError("factors: expected at least one, found none")
    for i, factor in enumerate(factors):
        expect(f"factors[{i}]", factor, torch.float32, (len(factor), len(factor)), x.device)
    block = math.prod(len(factor) for factor in factors)
    if x.shape[1] % block:
        raise ValueError(f"x: expected a multiple of the {block} channels that the factors mix, found {x.shape[1]}")


def check_quantize(
    x: Tensor,
    *,
    bits: int | None,
    outliers: int,
    int8: bool,
    norm_weight: Tensor | None,
    gated: bool,
    input_scale: Tensor | None,
    modality: Tensor | None,
    shared_channels: Tensor | None,
    expert_channels: Tensor | None,
    expert: Tensor | None,
    extracted: Tensor | None,
    salient_channels: Tensor | None,
) -> None:
    expect("x", x, FLOATS, (None, None), x.device)
    tokens, width = x.shape[0], x.shape[1] // (2 if gated else 1)
    if gated and x.shape[1] % 2:
        raise ValueError(f"x: expected gate and up side by side, of even width, found {list(x.shape)}")
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"x: expected 1 to {MAX_WIDTH} channels, found {width}")
    if bits is not None and not 2 <= bits <= 8:
        raise ValueError(f"bits: expected 2 to 8, or None for no grid, found {bits}")
    if bits is None and (outliers or int8):
        raise ValueError("bits: expected a grid for dynamic outlier channels or int8 codes, found None")
    if not 0 <= outliers < width:
        raise ValueError(f"outliers: expected 0 to {width - 1} of {width} channels, found {outliers}")
    if outliers and int8:
        raise ValueError("outliers: expected 0 with int8 codes, which hold no unrounded channels; use int8=False")
    if norm_weight is not None:
        expect("norm_weight", norm_weight, SCALES, (width,), x.device)
    if input_scale is not None:
        expect("input_scale", input_scale, SCALES, (None, width), x.device)
        if len(input_scale) > 1 and modality is None:
            raise ValueError(f"modality: expected one for each token, for {len(input_scale)} input scales, found None")
    if modality is not None:
        expect("modality", modality, torch.int8, (tokens,), x.device)
    for name, channels, dim in (
        ("shared_channels", shared_channels, 1),
        ("expert_channels", expert_channels, 2),
        ("salient_channels", salient_channels, 1),
    ):
        if channels is not None:
            expect(name, channels, INTEGERS, (None,) * dim, x.device)
    if expert_channels is not None and expert is None:
        raise ValueError("expert: expected one for each token, for expert_channels, found None")
    if expert is not None:
        expect("expert", expert, torch.int32, (tokens,), x.device)
    if (extracted is None) != (shared_channels is None and expert_channels is None):
        raise ValueError(
            f"extracted: expected extracted_columns of the extracted channels, and None without such, "
            f"found {'None' if extracted is None else 'a tensor'}"
        )
    if extracted is not None:
        rows = 1 if expert_channels is None else 1 + len(expert_channels)
        expect("extracted", extracted, torch.uint8, (rows, width), x.device)


def check_down(
    x: Tensor,
    *,
    shared: Tensor | None,
    shared_scale: Tensor | None,
    experts: Tensor | None,
    experts_scale: Tensor | None,
    router: Tensor | None,
    router_x: Tensor | None,
    expert: Tensor | None,
) -> None:
    expect("x", x, FLOATS, (None, None), x.device)
    tokens, width = x.shape
    if shared is not None:
        _expect_factor("shared", shared, shared_scale, (None,), width, x)
    if experts is not None:
        _expect_factor("experts", experts, experts_scale, (None, None), width, x)
        _expect_few("experts", experts)
    if shared is not None and experts is not None and shared.dtype != experts.dtype:
        raise ValueError(f"experts: expected {_short(shared.dtype)} like shared, found {_short(experts.dtype)}")
    if router is not None:
        expect("router", router, SCALES, (None, None, None), x.device)
        _expect_few("router", router[0])
        if router_x is None:
            raise ValueError("router_x: expected the tensor that the routers read, found None")
        expect("router_x", router_x, FLOATS, (tokens, router.shape[2]), x.device)
    if expert is not None:
        expect("expert", expert, torch.int32, (tokens,), x.device)


def check_linear(
    base: Tensor,
    token_scale: Tensor | None,
    weight: Weight,
    branches: Sequence[Branch],
    expert: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    order: Order | None,
) -> None:
    """order: that of the device that will read the weight; None: any, for the reference reads all."""
    device = base.device
    expect("base", base, torch.int8 if weight.int8 else FLOATS, (None, weight.columns), device)
    tokens = base.shape[0]
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype: expected bfloat16 or float16, found {_short(out_dtype)}")
    if not weight.int8 and base.dtype != out_dtype:
        raise ValueError(f"base: expected {_short(out_dtype)} like the output, found {_short(base.dtype)}")
    if weight.int8 and token_scale is None:
        raise ValueError("token_scale: expected one for each token, for int8 codes, found None")
    if token_scale is not None:
        expect("token_scale", token_scale, torch.float32, (tokens,), device)
    _check_weight("weight", weight, device, order)
    for index, branch in enumerate(branches):
        _check_branch(f"branches[{index}]", branch, tokens, weight.rows, base, out_dtype, expert)
    if expert is not None:
        expect("expert", expert, torch.int32, (tokens,), device)
    if bias is not None:
        expect("bias", bias, SCALES, (weight.rows,), device)


def _check_weight(name: str, weight: Weight, device: torch.device, order: Order | None) -> None:
    if order is not None and weight.order is not order:
        raise ValueError(
            f"{name}: expected the {order} order for {device}, found one packed in the {weight.order} order for "
            "another architecture; pack it again with order_for(device)"
        )
    if order is not None and not depths(weight):
        raise ValueError(
            f"{name}.group_size: expected 8, 16, or a multiple of 32 (of 64 or 128 for the narrow planes of 2, 3, 5, 6 "
            f"and 7 bits on Hopper), found {weight.group_size} for {weight.bits} bits"
        )
    widths = field_widths(weight.bits)
    if len(weight.planes) != len(widths):
        raise ValueError(f"{name}.planes: expected {len(widths)} for {weight.bits} bits, found {len(weight.planes)}")
    tiles = (-(-weight.rows // TILE_ROWS), -(-weight.columns // TILE_COLUMNS), TILE_ROWS)
    for index, (plane, width) in enumerate(zip(weight.planes, widths, strict=True)):
        expect(f"{name}.planes[{index}]", plane, torch.uint8, (*tiles, TILE_COLUMNS // 8 * width), device)
    groups = weight.columns // weight.group_size if weight.group_size else 1
    expect(f"{name}.scale", weight.scale, SCALES, (groups, weight.rows), device)


def _check_branch(
    name: str, branch: Branch, tokens: int, rows: int, base: Tensor, out_dtype: torch.dtype, expert: Tensor | None
) -> None:
    """z [M, R] or, of experts, [M, E, R]; up [N, C], as `pack_up` makes it."""
    z, up, experts = branch.z, branch.up, branch.experts
    if experts is not None and expert is None:
        raise ValueError(f"expert: expected one for each token, for {name} of experts, found None")
    if experts is not None and experts > MAX_EXPERTS:
        raise ValueError(f"{name}.experts: expected at most {MAX_EXPERTS}, found {experts}")
    if branch.rank != padded_rank(branch.rank):
        raise ValueError(
            f"{name}.z: expected a rank of 32, 64 or a multiple of 128, found {branch.rank}; see padded_down"
        )
    compact = experts is None or z.dim() == 2
    expect(f"{name}.z", z, out_dtype, (tokens, branch.rank) if compact else (tokens, experts, branch.rank), base.device)
    columns = padded_columns(branch.rank * (experts or 1))
    if isinstance(up, Tensor):
        expect(f"{name}.up", up, FLOATS, (rows, columns), base.device)
        return
    if (up.rows, up.columns, up.bits in (4, 8), up.int8) != (rows, columns, True, False):
        raise ValueError(
            f"{name}.up: expected 4 or 8 bits [{rows}, {columns}] for 16-bit tensor cores, found {up.bits} bits "
            f"[{up.rows}, {up.columns}]{' for int8' if up.int8 else ''}; see pack_up"
        )
    _check_weight(f"{name}.up", up, base.device, None)


def _expect_factor(
    name: str, values: Tensor, scale: Tensor | None, rows: Sequence[int | None], columns: int, beside: Tensor
) -> None:
    """values [*rows, columns] of 16 bits without a scale, or int8 or uint8 pairs with scale [*rows]."""
    pairs = values.dtype == torch.uint8
    if pairs and columns % 2:
        raise ValueError(f"{name}: expected an even width for two 4-bit codes to a byte, found {columns}")
    expect(name, values, FACTORS, (*rows, columns // 2 if pairs else columns), beside.device)
    if values.dtype in FLOATS:
        if scale is not None:
            raise ValueError(f"{name}.scale: expected none for {_short(values.dtype)} values, found one")
    elif scale is None:
        raise ValueError(f"{name}.scale: expected one for each row of {_short(values.dtype)} values, found None")
    else:
        expect(f"{name}.scale", scale, SCALES, values.shape[:-1], beside.device)


def _expect_few(name: str, experts: Tensor) -> None:
    if len(experts) > MAX_EXPERTS:
        raise ValueError(f"{name}: expected at most {MAX_EXPERTS} experts, found {len(experts)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
