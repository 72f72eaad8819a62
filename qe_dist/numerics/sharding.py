"""How a quantized group is cut for tensor parallelism (DESIGN section 6).

Column-parallel groups (q, k, v; gate, up) replicate what belongs to their input and cut the rest by outputs.
Row-parallel groups (o; down) cut what belongs to their input, and the codes, by inputs; what is linear in the cut input
is completed by the all-reduce of the layer itself. Every rank rounds its slice of a token to a grid of its own, never
coarser than the whole token's.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from qe_dist.core.scheme import Scheme

Parallel = Literal["column", "row"]
TILE = 64
"""Rows of a weight in a tile of the kernels (`TILE_ROWS` of qe_kernels/layout.py): no rank's gate and up end within."""

_BY_OUTPUTS = {
    "weight_packed": 0,
    "weight_scale": 0,
    "lr_shared_b": 0,
    "lr_shared_b_scale": 0,
    "lr_shared_columns": 0,
    "lr_expert_b": 1,
    "lr_expert_b_scale": 1,
    "lr_expert_columns": 1,
    "lr_salient_columns": 0,
    "lr_salient_columns_scale": 0,
}
_BY_INPUTS = {"weight_packed": 1, "weight_scale": 1}
_INPUT_BY_INPUTS = {"input_scale": 1, "lr_shared_a": 1, "lr_expert_a": 2}
_CHANNELS = ("lr_shared_channels", "lr_expert_channels", "lr_salient_channels")


def outputs_dim(name: str) -> int | None:
    """Dimension of the outputs in a linear's tensor of this name; None for a tensor without outputs."""
    return _BY_OUTPUTS.get(name)


def inputs_dim(name: str, shape: tuple[int, ...]) -> int | None:
    """Dimension in which a tensor of a row-parallel linear, or of its group's input, is cut; None for a tensor that
    every rank holds whole."""
    dim = (_BY_INPUTS | _INPUT_BY_INPUTS).get(name)
    return None if name == "weight_scale" and shape[1] == 1 else dim


def cut(tensor: Tensor, dim: int | None, rank: int, size: int) -> Tensor:
    """The part of this rank when the tensor is cut into `size` equal parts; dim None: the whole tensor."""
    return tensor if dim is None else tensor.chunk(size, dim)[rank]


def local_channels(tensors: Mapping[str, Tensor], width: int, rank: int) -> dict[str, Tensor]:
    """The tensors of a row-parallel group's input with channels counted from where the rank's slice of `width`
    begins; `width` itself stands for channels of other ranks."""
    local = dict(tensors)
    for name in _CHANNELS:
        if name in local:
            here = local[name] - rank * width
            local[name] = torch.where((here >= 0) & (here < width), here, width)
    return local


def padding_step(scheme: Scheme, size: int) -> int:
    """What a width is padded to multiples of, so that each of `size` ranks gets whole scale groups and whole tiles of
    the kernels. One rank takes any width."""
    return 1 if size == 1 else size * math.lcm(scheme.group_size or 1, TILE)


def why_not(
    scheme: Scheme, outputs: Mapping[str, int], inputs: int, parallel: Parallel, size: int, mixed: int = 1
) -> str | None:
    """Why a group cannot be cut into `size` parts; None where it can. outputs: of each linear. mixed: inputs that a
    rotation at run time mixes with each other (`core.quantized.rotated_block`)."""
    if parallel == "column":
        odd = next((name for name, count in outputs.items() if count % size), None)
        return None if odd is None else f"the {outputs[odd]} outputs of {odd} do not divide over {size} ranks"
    width, group = inputs // size, scheme.group_size or 1
    if size > 1 and scheme.dynamic_outliers:
        return (
            f"{scheme} has dynamic outlier channels, and each of {size} ranks would choose them in its own slice of a "
            "token: the answers would depend on the number of ranks"
        )
    if inputs % size:
        return f"its {inputs} inputs do not divide over {size} ranks"
    if width % group:
        return f"the {width} inputs of a rank do not divide into groups of {group}"
    if width % mixed:
        return (
            f"its rotation at run time mixes blocks of {mixed} inputs, and a rank has {width} of them; quantize for as "
            f"many ranks, with --tensor-parallel-size {size}, or with rotation.online = false"
        )
    if width * scheme.weight_bits % 32:
        return f"the {width} inputs of a rank do not fill whole words of 32 bits at {scheme.weight_bits} bits"
    return None
