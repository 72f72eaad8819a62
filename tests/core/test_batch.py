"""A batch travels as named tensors; its tokens have keys that know nothing of the batch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from qe_dist.core.batch import HELD_OUT, IMAGE, PADDING, TEXT, Batch, held_out_below, joined


def batch_of(ids: Sequence[int], length: int = 6) -> Batch:
    modality = torch.full((len(ids), length), TEXT, dtype=torch.int8)
    return Batch(0, torch.zeros(len(ids), length, 1), modality, torch.tensor(ids))


@pytest.fixture
def batch(normal: Callable[..., Any]) -> Batch:
    modality = torch.tensor([[IMAGE, IMAGE, TEXT, TEXT], [TEXT, TEXT, PADDING, PADDING]], dtype=torch.int8)
    context = {"cos": normal(1, 3, 2, 4, 6), "rotary.sin": normal(2, 3, 2, 4, 6).transpose(2, 3)}
    return Batch(7, normal(0, 2, 4, 5).bfloat16(), modality, torch.tensor([41, 12]), context)


def test_a_batch_survives_a_file(batch: Batch, same: Callable[[Any, Any], bool]) -> None:
    file = safetensors.torch.save(batch.tensors())
    assert same(Batch.from_tensors(safetensors.torch.load(file)), batch)


def test_padding_is_not_counted(batch: Batch) -> None:
    assert batch.num_tokens == 6


def test_with_hidden_keeps_everything_else(batch: Batch, same: Callable[[Any, Any], bool]) -> None:
    moved = batch.with_hidden(batch.hidden + 1)
    assert torch.equal(moved.hidden, batch.hidden + 1)
    assert same(replace(moved, hidden=batch.hidden), batch)


@given(ids=st.permutations(range(6)), cut=st.integers(1, 5), length=st.integers(1, 9), more=st.integers(0, 5))
def test_keys_depend_on_sample_and_position_only(ids: list[int], cut: int, length: int, more: int) -> None:
    """Whatever the order of samples, where batches are cut, and how much is padded."""
    of_sample = dict(zip(range(6), batch_of(range(6), length).token_keys(), strict=True))
    for part in (ids[:cut], ids[cut:]):
        keys = batch_of(part, length + more).token_keys()[:, :length]
        for sample, row in zip(part, keys, strict=True):
            assert torch.equal(row, of_sample[sample])


@given(count=st.integers(0, 200), cut=st.integers(0, 200))
def test_one_sequence_in_sixteen_is_held_out_whole_whatever_the_batches(count: int, cut: int) -> None:
    below = held_out_below(count)
    parts = [part for part in (range(count)[:cut], range(count)[cut:]) if part]
    rows = torch.cat([torch.zeros(0, 6, dtype=torch.bool), *(batch_of(part).held_out(below) for part in parts)])
    assert torch.equal(rows.any(dim=1), rows.all(dim=1))
    assert int(rows.all(dim=1).sum()) == count // HELD_OUT
    assert [mixed(i + 1) < below for i in range(count)] == rows.all(dim=1).tolist()


def mixed(number: int) -> int:
    """The finalizer of SplitMix64 with Python's integers, shifts being those of signed numbers."""

    def signed(value: int) -> int:
        return (value + 2**63) % 2**64 - 2**63

    number = signed(number * 0x9E3779B97F4A7C15)
    number = signed((number ^ number >> 30) * 0xBF58476D1CE4E5B9)
    number = signed((number ^ number >> 27) * 0x94D049BB133111EB)
    return (number ^ number >> 31) % 2**63


def test_keys_are_these_numbers_and_no_others() -> None:
    """Another mixing would be as good, but every run would sample other tokens."""
    ids = [0, 1, 7, 123_456_789]
    keys = batch_of(ids, 5).token_keys().tolist()
    assert keys == [[mixed(mixed(sample + 1) + position) for position in range(5)] for sample in ids]


def test_keys_are_distinct_and_not_negative() -> None:
    keys = batch_of(range(64), 512).token_keys().flatten()
    assert keys.unique().numel() == keys.numel()
    assert keys.min() >= 0


@pytest.mark.parametrize("shift", [0, 20, 40, 57])
def test_keys_are_well_spread(shift: int) -> None:
    """Six bits at each end and in between fall into 64 bins evenly: 512 expected, 5 standard deviations allowed."""
    keys = batch_of(range(64), 512).token_keys().flatten()
    counts = torch.bincount((keys >> shift) & 63, minlength=64)
    assert (counts - 512).abs().max() < 5 * 512**0.5


def test_the_smallest_keys_come_from_everywhere() -> None:
    """The token sample is the smallest keys; 1024 of them over 64 samples and 8 stretches of positions."""
    order = batch_of(range(64), 512).token_keys().flatten().argsort()[:1024]
    of_sample = torch.bincount(order // 512, minlength=64)
    of_stretch = torch.bincount(order % 512 // 64, minlength=8)
    assert (of_sample - 16).abs().max() < 5 * 16**0.5
    assert (of_stretch - 128).abs().max() < 5 * 128**0.5


@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4), seed=st.integers(0, 99), own_tables=st.booleans())
def test_samples_are_taken_from_joined_batches_as_they_were(sizes: list[int], seed: int, own_tables: bool) -> None:
    """Each padded no further than it must be, with its own rows of the tables that the blocks need."""
    draw, first, batches = torch.Generator().manual_seed(seed), 0, []
    for size in sizes:
        lengths = torch.randint(1, 7, (size,), generator=draw)
        length = int(lengths.max())
        modality = torch.where(torch.arange(length) < lengths[:, None], TEXT, PADDING).to(torch.int8)
        ids = torch.arange(first, first + size)
        positions = torch.arange(length).view(1, length, 1).float()
        table = positions + 100 * ids[:, None, None] if own_tables else positions
        hidden = torch.randn(size, length, 2, generator=draw)
        batches.append(Batch(first, hidden, modality, ids, {"cos": table.expand(3, -1, -1, 4)}))
        first += size
    whole = joined(batches)
    assert torch.equal(whole.sample_ids, torch.arange(first))
    assert whole.num_tokens == sum(batch.num_tokens for batch in batches)
    rows = torch.randperm(first, generator=draw)[: int(torch.randint(1, first + 1, (1,), generator=draw))]
    taken = whole.take(rows)
    assert torch.equal(taken.sample_ids, rows)
    assert taken.modality.shape[1] == int((taken.modality != PADDING).sum(1).max())
    for i, row in enumerate(rows.tolist()):
        batch = next(b for b in reversed(batches) if b.index <= row)
        own, count = row - batch.index, int((taken.modality[i] != PADDING).sum())
        assert count == int((batch.modality[own] != PADDING).sum())
        assert torch.equal(taken.hidden[i, :count], batch.hidden[own, :count])
        table = batch.context["cos"][:, own if own_tables else 0]
        assert torch.equal(taken.context["cos"][:, i, :count], table[:, :count])
