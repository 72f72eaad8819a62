"""Branches as the linear reads them: what stands in them, and which part of K adds what."""

import pytest
import torch
from qe_kernels.branches import Branch, pack_up
from qe_kernels.factors import dense, padded_channels, padded_down, padded_rank
from qe_kernels.layout import Order
from qe_kernels.linear import Config, linear
from qe_kernels.split_k import Workspace
from torch import Tensor

from tests.kernels.test_linear import DEVICE, on_device, random_factor, random_weight

FORMS = ("bf16", "int8", "pairs")


@pytest.mark.parametrize(("rank", "padded"), [(1, 32), (32, 32), (33, 64), (64, 64), (65, 128), (284, 384), (449, 512)])
def test_a_rank_is_filled_up(rank: int, padded: int) -> None:
    assert padded_rank(rank) == padded


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("experts", "rank"), [(None, 6), (None, 130), (3, 16), (2, 40), (2, 128)])
def test_a_packed_factor_is_the_factor_and_zeros(form: str, order: Order, experts: int | None, rank: int) -> None:
    shape = (70, rank) if experts is None else (experts, 70, rank)
    values, scale, exact = random_factor(torch.Generator().manual_seed(0), form, torch.bfloat16, *shape)
    z = torch.empty(1, *(() if experts is None else (experts,)), padded_rank(rank))
    found = Branch(z, pack_up((values, scale), order), experts).dense(torch.float64)
    assert found.shape[1] % 128 == 0
    stacked = exact[None] if experts is None else exact
    own = found[:, : len(stacked) * z.shape[-1]].unflatten(1, (len(stacked), -1)).transpose(0, 1)
    assert torch.equal(own[..., :rank], stacked)
    assert found.count_nonzero() == exact.count_nonzero()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(40, 64), (3, 16, 64)])
def test_a_padded_down_factor_has_more_rows_of_zeros(form: str, shape: tuple[int, ...]) -> None:
    values, scale, exact = random_factor(torch.Generator().manual_seed(0), form, torch.bfloat16, *shape)
    found = dense(*padded_down((values, scale)), torch.float64)
    assert found.shape == (*shape[:-2], padded_rank(shape[-2]), 64)
    assert torch.equal(found[..., : shape[-2], :], exact)
    assert found.count_nonzero() == exact.count_nonzero()


def test_a_factor_that_fits_is_not_copied() -> None:
    values = torch.ones(64, 8)
    assert padded_down((values, None))[0] is values


def test_lists_are_filled_up_with_a_channel_that_is_nobodys() -> None:
    found = padded_channels(torch.tensor([[3, 1], [0, 2]]), 8)
    assert found.tolist() == [[3, 1, *[8] * 30], [0, 2, *[8] * 30]]


def chunks_by_part(z: Tensor, ups: list[Tensor], experts: int | None, split_k: int) -> list[list[int]]:
    """Which chunks of 64 columns of all branches, one after the other, each part of K adds: chunk i adds 2^i."""
    weight, _ = random_weight(torch.Generator().manual_seed(0), 64, 512, 4, None, Order.NATURAL, False)
    base, expert = torch.zeros(1, 512, dtype=torch.bfloat16), torch.tensor([1], dtype=torch.int32)
    branches = [Branch(z, up, experts) for up in ups]
    workspace = Workspace.allocate(split_k * 64 * 16, 1, DEVICE)
    arguments = on_device({"base": base, "token_scale": None, "weight": weight, "branches": branches, "expert": expert})
    config = Config(64, 16, 64, split_k=split_k)
    linear(**arguments, out_dtype=torch.bfloat16, config=config, workspace=workspace)
    sums = workspace.partials.view(split_k, 64, 16)[:, 0, 0].long()
    return [[i for i in range(16) if int(total) >> i & 1] for total in sums]


def powers(columns: int, first: int) -> Tensor:
    up = torch.zeros(64, columns, dtype=torch.bfloat16)
    up[:, ::64] = 2.0 ** torch.arange(first, first + columns // 64)
    return up


@pytest.mark.parametrize("split_k", [2, 4, 8])
def test_chunks_go_round_the_parts_over_all_branches(split_k: int) -> None:
    """So no part has more than one more than another, and none comes last with a whole branch."""
    z = torch.zeros(1, 384, dtype=torch.bfloat16)
    z[:, ::64] = 1.0
    found = chunks_by_part(z, [powers(384, 0), powers(384, 6)], None, split_k)
    assert found == [list(range(part, 12, split_k)) for part in range(split_k)]


def test_only_chunks_of_chosen_experts_are_added() -> None:
    """The token has the second of two experts of three chunks."""
    z = torch.zeros(1, 2, 128, dtype=torch.bfloat16)
    z[..., ::64] = 1.0
    assert chunks_by_part(z, [powers(256, 0)], 2, 2) == [[2], [3]]
