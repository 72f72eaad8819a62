"""Whether ranks that each hold their part of a checkpoint compute together what the whole computes, block by block.

The parts are cut from the stored tensors by the rules that engines follow (`numerics/sharding.py`) and run by the
reference. What they are compared with is never cut, but for one thing: every rank of a row-parallel group rounds its
slice of a token to a grid of its own. Memory: one group of one block, in float32.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open
from torch import Tensor

from qe_dist import archs
from qe_dist.checkpoint.serving import layout_linears
from qe_dist.checkpoint.verify import Checkpoint
from qe_dist.core.quantized import GroupInput, QuantizedLinear, input_from_tensors, repair_from_tensors
from qe_dist.core.scheme import Scheme
from qe_dist.core.spec import LinearSpec
from qe_dist.numerics.grid import dequantize, round_activations
from qe_dist.numerics.packing import unpack
from qe_dist.numerics.reference import linear_forward, prepare, route, salient_of
from qe_dist.numerics.serving import parts_of
from qe_dist.numerics.sharding import cut, inputs_dim, local_channels, outputs_dim

TOKENS = 32
ROUNDING = 1e-4
"""How far an output may be off, over all tokens and relative to itself: sums in another order."""


@dataclass(frozen=True)
class _Group:
    """A group as it is stored, and what it reads."""

    scheme: Scheme
    input: Mapping[str, Tensor]
    linears: Mapping[LinearSpec, Mapping[str, Tensor]]
    x: Tensor
    router_x: Tensor


def check_ranks(checkpoint: Checkpoint, sizes: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Each size with a line for every linear that its ranks compute otherwise than the whole; the checkpoint must be
    sound, and the sizes such that it can be served."""
    of_model = archs.for_checkpoint(checkpoint.config).groups(checkpoint.config)
    widths = {name: g.in_features for g in of_model for name in (g.name, *(x.name for x in g.linears))}
    for block, layout in checkpoint.blocks:
        for name, said in layout.groups.items():
            where, router = f"{block.prefix}{name}", said.router_input
            linears = layout_linears(said, of_model)
            group = _Group(
                said.scheme,
                _read(checkpoint, f"{where}_input", said.input),
                {x: _read(checkpoint, block.prefix + x.name, said.linears[x.name]) for x in linears},
                _tokens(where, widths[name]),
                _tokens(block.prefix + router, widths[router]),
            )
            yield from ((size, f"{where}: {fault}") for size, fault in _differences(group, sizes))


def _read(checkpoint: Checkpoint, module: str, names: Iterable[str]) -> dict[str, Tensor]:
    tensors = {}
    for name in names:
        full = f"{module}.{name}"
        with safe_open(checkpoint.folder / checkpoint.weight_map[full], framework="pt") as file:
            tensors[name] = file.get_tensor(full)
    return tensors


def _tokens(name: str, width: int) -> Tensor:
    """Random tokens, some channels of which are much larger than others, as activations have them. [TOKENS, width]"""
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(TOKENS, width, generator=draw) * torch.randn(width, generator=draw).mul(1.5).exp()


def _differences(group: _Group, sizes: Sequence[int]) -> Iterator[tuple[int, str]]:
    part = input_from_tensors(group.input)
    expert = route(part, group.router_x)
    unrounded = prepare(part, group.x, expert, replace(group.scheme, act_bits=None, dynamic_outliers=None))
    for linear, tensors in group.linears.items():
        whole = _linear(tensors, group.scheme, linear.in_features)
        weight = dequantize(whole.codes, whole.scale)
        exact = linear_forward(whole, unrounded, weight)
        reach = _of_the_rounded(whole, weight, part).abs().sum(dim=1)
        for size in sizes:
            named, is_row = f"{linear.name} over {size} ranks", linear.split == "row"
            slices = unrounded.base.unflatten(1, (size if is_row else 1, -1)).flatten(0, 1)  # one grid each
            rounded = round_activations(slices, group.scheme).view_as(unrounded.base)
            rounding = replace(unrounded, base=rounded, salient=salient_of(rounded, part))
            wanted = linear_forward(whole, rounding, weight)
            got = (_sum_of_rows if is_row else _columns_together)(group, linear, size)
            off, slack = (got - wanted).norm(dim=0), ROUNDING * wanted.norm(dim=0)
            if not bool((off <= slack).all()):
                worst = (off / wanted.norm(dim=0)).nan_to_num(torch.inf).max()
                yield size, f"{named} is off by {worst:.1e} of an output, {ROUNDING:.0e} is rounding"
            if group.scheme.act_bits is not None:
                step = unrounded.base.abs().amax(dim=1, keepdim=True) / (2 ** (group.scheme.act_bits - 1) - 1)
                if not bool(((got - exact).abs() <= step / 2 * reach + slack).all()):
                    yield size, f"{named} is further off the product than its activation grid explains"


def _of_the_rounded(linear: QuantizedLinear, weight: Tensor, part: GroupInput) -> Tensor:
    """All that the rounded input is multiplied with: the weight, and what salient columns add to it. [O, I]"""
    if linear.salient_columns is None or part.salient_channels is None:
        return weight
    return weight.index_add(1, part.salient_channels.long(), linear.salient_columns.dense)


def _columns_together(group: _Group, linear: LinearSpec, size: int) -> Tensor:
    """What ranks compute that have all inputs and some outputs, side by side. [TOKENS, O]"""
    part, stored = input_from_tensors(group.input), group.linears[linear]
    prepared = prepare(part, group.x, route(part, group.router_x), group.scheme)
    parts = parts_of(linear, size)
    own = [{n: cut(t, outputs_dim(n), index, parts) for n, t in stored.items()} for index in range(parts)]
    return torch.cat([linear_forward(_linear(o, group.scheme, linear.in_features), prepared) for o in own], dim=1)


def _sum_of_rows(group: _Group, linear: LinearSpec, size: int) -> Tensor:
    """What ranks compute that have some inputs and all outputs, added up as the all-reduce does; each chooses experts
    by itself. [TOKENS, O]"""
    width, total = linear.in_features // size, torch.zeros(TOKENS, linear.out_features)
    for rank in range(size):
        own, shared = (
            {n: cut(t, inputs_dim(n, tuple(t.shape)), rank, size) for n, t in tensors.items()}
            for tensors in (group.linears[linear], group.input)
        )
        part = input_from_tensors(local_channels(shared, width, rank))
        x = group.x[:, rank * width : (rank + 1) * width]
        prepared = prepare(part, x, route(part, group.router_x), group.scheme)
        total += linear_forward(_linear(own, group.scheme, width), prepared)
    return total


def _linear(tensors: Mapping[str, Tensor], scheme: Scheme, inputs: int) -> QuantizedLinear:
    codes = unpack(tensors["weight_packed"], scheme.weight_bits, inputs)
    return QuantizedLinear(codes, tensors["weight_scale"], **repair_from_tensors(tensors))
