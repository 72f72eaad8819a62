"""Ranks that each hold their part give together what one device gives."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qe_dist.core.quantized import (
    GroupInput,
    QuantizedLinear,
    input_from_tensors,
    input_tensors,
    repair_from_tensors,
)
from qe_dist.core.scheme import Scheme
from qe_dist.io.checkpoint import linear_tensors
from qe_dist.numerics.factors import store_factor
from qe_dist.numerics.packing import unpack
from qe_dist.numerics.reference import linear_forward, prepare, route
from qe_dist.numerics.sharding import cut, inputs_dim, local_channels, outputs_dim, why_not

Normal = Callable[..., Tensor]
TOKENS, INPUTS, OUTPUTS, RANK, EXPERTS, GROUP = 24, 64, 16, 6, 3, 16


@pytest.fixture(params=[16, 8, 4])
def group(request: pytest.FixtureRequest, normal: Normal) -> tuple[GroupInput, QuantizedLinear]:
    """A linear with all that a recipe can give it."""
    bits = request.param
    part = GroupInput(
        input_scale=(normal(1, 1, INPUTS).abs() + 0.5).bfloat16(),
        shared_down=store_factor(normal(2, RANK, INPUTS), bits),
        shared_channels=torch.tensor([3, 40], dtype=torch.int32),
        expert_down=store_factor(normal(3, EXPERTS, RANK, INPUTS), bits),
        expert_channels=torch.tensor([[0, 5, 63], [31, 2, 11], [32, 33, 34]], dtype=torch.int32),
        router=normal(4, EXPERTS, INPUTS).bfloat16(),
        salient_channels=torch.tensor([9, 62], dtype=torch.int32),
    )
    linear = QuantizedLinear(
        codes=(4 * normal(5, OUTPUTS, INPUTS)).clamp(-8, 7).to(torch.int8),
        scale=(0.02 * normal(6, OUTPUTS, INPUTS // GROUP).abs()).bfloat16(),
        shared_up=store_factor(normal(7, OUTPUTS, RANK), bits),
        shared_columns=normal(8, OUTPUTS, 2).bfloat16(),
        expert_up=store_factor(normal(9, EXPERTS, OUTPUTS, RANK), bits),
        expert_columns=normal(10, EXPERTS, OUTPUTS, 3).bfloat16(),
        salient_columns=store_factor(normal(11, OUTPUTS, 2), bits),
    )
    return part, linear


def forward(part: GroupInput, linear: QuantizedLinear, x: Tensor, expert: Tensor | None, scheme: Scheme) -> Tensor:
    return linear_forward(linear, prepare(part, x, expert, scheme))


def from_tensors(tensors: dict[str, Tensor], columns: int) -> QuantizedLinear:
    codes = unpack(tensors["weight_packed"], 4, columns)
    return QuantizedLinear(codes, tensors["weight_scale"], **repair_from_tensors(tensors))


@pytest.mark.parametrize("size", [2, 4])
def test_column_parallel_ranks_hold_the_outputs_side_by_side(
    normal: Normal, group: tuple[GroupInput, QuantizedLinear], size: int
) -> None:
    part, linear = group
    x, scheme = normal(0, TOKENS, INPUTS), Scheme(4, 6, GROUP, dynamic_outliers=4)
    tensors = linear_tensors(linear, 4)
    parts = [{n: cut(t, outputs_dim(n), rank, size) for n, t in tensors.items()} for rank in range(size)]
    got = [forward(part, from_tensors(own, INPUTS), x, route(part, x), scheme) for own in parts]
    wanted = forward(part, linear, x, route(part, x), scheme)
    torch.testing.assert_close(torch.cat(got, dim=1), wanted)


@pytest.mark.parametrize("size", [2, 4])
def test_row_parallel_ranks_add_up(normal: Normal, group: tuple[GroupInput, QuantizedLinear], size: int) -> None:
    """The router reads a replicated input. Activations are not rounded here: a rank has grids of its own."""
    part, linear = group
    x, scheme, width = normal(0, TOKENS, INPUTS), Scheme(4, None, GROUP), INPUTS // size
    expert, total = route(part, x), torch.zeros(TOKENS, OUTPUTS)
    for rank in range(size):
        mine = {n: cut(t, inputs_dim(n, tuple(t.shape)), rank, size) for n, t in linear_tensors(linear, 4).items()}
        given = {n: cut(t, inputs_dim(n, tuple(t.shape)), rank, size) for n, t in input_tensors(part).items()}
        own = input_from_tensors(local_channels(given, width, rank))
        total += forward(own, from_tensors(mine, width), x[:, rank * width :][:, :width], expert, scheme)
    torch.testing.assert_close(total, forward(part, linear, x, expert, scheme), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act_bits", [8, 4])
def test_the_grid_of_a_rank_is_never_coarser_than_that_of_the_whole_token(normal: Normal, act_bits: int) -> None:
    x, scheme = normal(0, TOKENS, INPUTS), Scheme(4, act_bits)
    whole = (prepare(GroupInput(), x, None, scheme).base - x).abs().amax(dim=1)
    halves = [prepare(GroupInput(), half, None, scheme).base - half for half in x.chunk(2, dim=1)]
    step = x.abs().amax(dim=1) / (2 ** (act_bits - 1) - 1)
    assert (torch.cat(halves, dim=1).abs().amax(dim=1) <= step / 2 * 1.001).all()
    assert (whole <= step / 2 * 1.001).all()


def test_a_scale_for_each_output_stays_whole() -> None:
    assert inputs_dim("weight_scale", (16, 1)) is None
    assert inputs_dim("weight_scale", (16, 4)) == 1


@given(st.integers(2, 8), st.integers(1, 64), st.sampled_from([None, 8, 32, 64]), st.integers(1, 8))
def test_a_cut_is_allowed_only_where_each_rank_has_whole_words_and_groups(bits, eights, group, size):
    inputs = 64 * eights
    why = why_not(Scheme(bits, None, group), {"o_proj": 16}, inputs, "row", size)
    legal = inputs % size == 0 and (inputs // size) % math.lcm(group or 1, 32 // math.gcd(bits, 32)) == 0
    assert (why is None) == legal


@given(st.integers(3, 8), st.integers(1, 64), st.integers(2, 8))
def test_dynamic_outlier_channels_are_cut_by_outputs_alone(act_bits: int, count: int, size: int) -> None:
    """A rank of a row-parallel group would choose its own; one of a column-parallel group sees the whole token."""
    scheme = Scheme(4, act_bits, dynamic_outliers=count)
    row, column = (why_not(scheme, {"x": 64 * size}, 64 * size, cut, size) for cut in ("row", "column"))
    assert "dynamic outlier channels" in row
    assert "depend on the number of ranks" in row
    assert column is None
    assert why_not(scheme, {"x": 64}, 64, "row", 1) is None
    assert why_not(replace(scheme, dynamic_outliers=None), {"x": 64}, 64 * size, "row", size) is None


def test_ranks_that_chose_their_own_outlier_channels_would_add_up_to_something_else(normal: Normal) -> None:
    """Why they are refused: the same token, whole and in halves."""
    x, scheme = normal(0, TOKENS, INPUTS), Scheme(4, 4, dynamic_outliers=256)
    whole = prepare(GroupInput(), x, None, scheme).base
    halves = [prepare(GroupInput(), half.contiguous(), None, scheme).base for half in x.chunk(2, dim=1)]
    unrounded = [(made == wanted).sum(dim=1) for made, wanted in ((whole, x), (torch.cat(halves, dim=1), x))]
    assert not torch.equal(*unrounded)


def test_blocks_of_a_rotation_stay_on_one_rank() -> None:
    why = why_not(Scheme(4, 8), {"mlp.down_proj": 576}, 1536, "row", 2, mixed=1536)
    assert why.startswith("its rotation at run time mixes blocks of 1536 inputs, and a rank has 768 of them")
    assert "--tensor-parallel-size 2" in why
    assert why_not(Scheme(4, 8), {"mlp.down_proj": 576}, 1536, "row", 2, mixed=768) is None
    assert why_not(Scheme(4, 8), {"q": 576}, 1536, "column", 2, mixed=1536) is None


def test_what_does_not_divide_is_named() -> None:
    scheme = Scheme(4, None, 128)
    assert why_not(scheme, {"mlp.down_proj": 8192}, 29568, "row", 2) == (
        "the 14784 inputs of a rank do not divide into groups of 128"
    )
    outputs = {"self_attn.q_proj": 64, "self_attn.k_proj": 6}
    assert why_not(scheme, outputs, 64, "column", 4) == "the 6 outputs of self_attn.k_proj do not divide over 4 ranks"
    assert why_not(replace(scheme, group_size=None), {"o": 8}, 24, "row", 2) == (
        "the 12 inputs of a rank do not fill whole words of 32 bits at 4 bits"
    )
