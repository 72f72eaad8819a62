"""Statistics in one pass equal those of all tokens at once in float64, however the tokens are cut and merged."""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qe_dist.core.batch import IMAGE, TEXT
from qe_dist.numerics.stats import GroupStats, Needs, TokenSample, held_out_size

TOKENS, WIDTH, ROUTER_WIDTH, SAMPLE = 120, 96, 10, 40
EVERYTHING = Needs(gram=True, top_channels=frozenset({48, 96}))
"""48 of 1536 channels is 3 of 96."""

Same = Callable[[Any, Any], bool]


@pytest.fixture(scope="module")
def weights(normal: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {"q": normal(0, 40, WIDTH), "k": normal(1, 24, WIDTH)}


@pytest.fixture(scope="module")
def tokens(normal: Callable[..., Tensor]) -> TokenSample:
    """Every token of the calibration set; one in three is of an image. Keys are in no order."""
    keys = torch.randperm(10 * TOKENS, generator=torch.Generator().manual_seed(2))[:TOKENS]
    modality = torch.where(torch.arange(TOKENS) % 3 == 0, IMAGE, TEXT).to(torch.int8)
    return TokenSample(keys, normal(3, TOKENS, WIDTH), normal(4, TOKENS, ROUTER_WIDTH), modality)


def rows(tokens: TokenSample, keep: Tensor | slice) -> TokenSample:
    return TokenSample(*(tensor[keep] for tensor in vars(tokens).values()))


def cut(tokens: TokenSample, places: Sequence[int]) -> list[TokenSample]:
    edges = [0, *sorted(places), len(tokens.keys)]
    return [rows(tokens, slice(a, b)) for a, b in itertools.pairwise(edges)]


@pytest.fixture(scope="module")
def gathered(weights: dict[str, Tensor]) -> Callable[..., GroupStats]:
    """gathered(batch, ...): one update per batch."""

    def gather(*batches: TokenSample, needs: Needs = EVERYTHING) -> GroupStats:
        stats = GroupStats.empty(weights, ROUTER_WIDTH, needs, SAMPLE)
        for batch in batches:
            stats.update(batch.x, batch.router_x, batch.modality, batch.keys)
        return stats

    return gather


@pytest.fixture
def whole(gathered: Callable[..., GroupStats], tokens: TokenSample) -> GroupStats:
    return gathered(tokens)


def assert_equal_up_to_summation(a: GroupStats, b: GroupStats, same: Same) -> None:
    """What is counted, compared or chosen is equal; sums may differ in their last bits."""
    exact = ("needs", "sample_size", "count", "nonfinite", "abs_max", "top_count", "sample", "importance")
    assert [name for name in exact if not same(getattr(a, name), getattr(b, name))] == []
    assert torch.allclose(a.abs_sum, b.abs_sum, rtol=1e-12)  # float64
    size = a.gram.diagonal(dim1=1, dim2=2).amax()
    assert (a.gram - b.gram).abs().max() <= 1e-5 * size  # float32


def test_sums_equal_those_of_all_tokens_at_once(whole: GroupStats, tokens: TokenSample) -> None:
    for m in (TEXT, IMAGE):
        x = tokens.x[tokens.modality == m].double()
        assert whole.count[m] == len(x)
        assert torch.equal(whole.abs_max[m].double(), x.abs().amax(dim=0))
        assert torch.allclose(whole.abs_sum[m], x.abs().sum(dim=0), rtol=1e-12)
        gram = x.T @ x
        assert (whole.gram[m] - gram).abs().max() < 1e-5 * gram.diagonal().max()  # float32 products
    assert whole.nonfinite == 0
    assert whole.num_tokens == TOKENS


def test_importance_is_the_mean_weight_over_all_outputs_of_the_group(
    whole: GroupStats, weights: dict[str, Tensor]
) -> None:
    stacked = torch.cat(list(weights.values())).double()
    assert torch.allclose(whole.importance.double(), stacked.abs().mean(dim=0), rtol=1e-6)


def test_top_channels_are_counted_as_in_a_loop(whole: GroupStats, tokens: TokenSample) -> None:
    for k, cut in {48: 3, 96: 6}.items():  # of a narrow layer
        counts = torch.zeros(2, WIDTH, dtype=torch.int64)
        for token, modality in zip(tokens.x, tokens.modality.tolist(), strict=True):
            score = {c: float(abs(v) * w) for c, (v, w) in enumerate(zip(token, whole.importance, strict=True))}
            for channel in sorted(score, key=score.get)[-cut:]:
                counts[modality, channel] += 1
        assert torch.equal(whole.top_count[k], counts)


def test_what_is_derived(whole: GroupStats, tokens: TokenSample) -> None:
    x = tokens.x.double()
    assert torch.allclose(whole.mean_abs.double(), x.abs().mean(dim=0), rtol=1e-6)
    assert torch.allclose(whole.total_gram.double(), x.T @ x, atol=1e-3)
    assert whole.frequency(48).sum() == pytest.approx(3)  # arXiv 2602.24059: the f_c add up to k
    assert torch.equal(whole.frequency(96), whole.top_count[96].sum(dim=0).double() / TOKENS)


@given(places=st.lists(st.integers(0, TOKENS), max_size=4))
def test_batches_do_not_matter(
    tokens: TokenSample, gathered: Callable[..., GroupStats], same: Same, places: list[int]
) -> None:
    assert_equal_up_to_summation(gathered(*cut(tokens, places)), gathered(tokens), same)


@given(places=st.lists(st.integers(0, TOKENS), max_size=4))
def test_merged_parts_are_the_whole(
    tokens: TokenSample, gathered: Callable[..., GroupStats], same: Same, places: list[int]
) -> None:
    first, *others = [gathered(part) for part in cut(tokens, places)]
    for other in others:
        first = first.merge(other)
    assert_equal_up_to_summation(first, gathered(tokens), same)


def test_merging_in_batch_order_is_equal_to_the_bit(
    tokens: TokenSample, gathered: Callable[..., GroupStats], same: Same
) -> None:
    parts = cut(tokens, [30, 31, 90])
    merged = gathered(parts[0])
    for part in parts[1:]:
        merged = merged.merge(gathered(part))
    assert same(merged, gathered(*parts))


def test_the_order_of_merging_does_not_matter(
    tokens: TokenSample, gathered: Callable[..., GroupStats], same: Same
) -> None:
    a, b, c = (gathered(part) for part in cut(tokens, [30, 70]))
    assert_equal_up_to_summation(a.merge(b.merge(c)), c.merge(a).merge(b), same)


def test_an_empty_part_changes_nothing(
    tokens: TokenSample, gathered: Callable[..., GroupStats], whole: GroupStats, same: Same
) -> None:
    assert same(whole.merge(gathered()), gathered(tokens))
    assert same(gathered().merge(whole), gathered(tokens))
    assert same(gathered(tokens, rows(tokens, slice(0, 0))), gathered(tokens))


def test_merging_does_not_change_its_parts(
    tokens: TokenSample, gathered: Callable[..., GroupStats], same: Same
) -> None:
    a, b = (gathered(part) for part in cut(tokens, [50]))
    before = copy.deepcopy((a, b))
    a.merge(b)
    assert same((a, b), before)


@given(order=st.permutations(range(TOKENS)), places=st.lists(st.integers(0, TOKENS), max_size=3))
def test_the_token_sample_is_the_smallest_keys_whatever_came_when(
    tokens: TokenSample, gathered: Callable[..., GroupStats], same: Same, order: list[int], places: list[int]
) -> None:
    wanted = rows(tokens, tokens.keys.argsort()[:SAMPLE])
    assert same(gathered(*cut(rows(tokens, torch.tensor(order)), places)).sample, wanted)


def test_a_sample_of_few_tokens_has_them_all(
    tokens: TokenSample, gathered: Callable[..., GroupStats], same: Same
) -> None:
    few = rows(tokens, slice(0, 5))
    assert same(gathered(few).sample, rows(few, few.keys.argsort()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_tokens_are_counted_and_left_out(
    tokens: TokenSample, gathered: Callable[..., GroupStats], same: Same, bad: float
) -> None:
    sick = copy.deepcopy(tokens)
    sick.x[7, 3] = bad
    sick.router_x[11, 2] = bad
    sick.x[12] = bad
    healthy = torch.ones(TOKENS, dtype=torch.bool)
    healthy[[7, 11, 12]] = False
    stats = gathered(sick)
    assert stats.nonfinite == 3
    assert stats.num_tokens == TOKENS - 3
    stats.nonfinite = 0
    assert same(stats, gathered(rows(tokens, healthy)))


def test_bad_tokens_add_up_over_batches_and_parts(tokens: TokenSample, gathered: Callable[..., GroupStats]) -> None:
    sick = copy.deepcopy(tokens)
    sick.x[::10] = float("nan")
    parts = cut(sick, [33, 80])
    assert gathered(*parts).nonfinite == 12
    assert gathered(parts[0]).merge(gathered(*parts[1:])).nonfinite == 12


def test_update_does_not_change_the_tokens(
    tokens: TokenSample, gathered: Callable[..., GroupStats], same: Same
) -> None:
    before = copy.deepcopy(tokens)
    gathered(tokens)
    assert same(tokens, before)


def test_bf16_tokens_are_summed_in_full_precision(tokens: TokenSample, gathered: Callable[..., GroupStats]) -> None:
    half = TokenSample(tokens.keys, tokens.x.bfloat16(), tokens.router_x.bfloat16(), tokens.modality)
    x = half.x.double()
    stats = gathered(half)
    assert torch.allclose(stats.abs_sum.sum(dim=0), x.abs().sum(dim=0), rtol=1e-12)
    assert torch.allclose(stats.total_gram.double(), x.T @ x, atol=1e-3)
    assert stats.sample.x.dtype == torch.float32


def test_rescaled_statistics_are_those_of_the_rescaled_data(
    tokens: TokenSample, weights: dict[str, Tensor], gathered: Callable[..., GroupStats], same: Same
) -> None:
    """Scales that are powers of two move exponents only, so equality is exact, which ones are top included."""
    scale = 2.0 ** torch.randint(-6, 7, (WIDTH,), generator=torch.Generator().manual_seed(5))
    moved = GroupStats.empty({n: w * scale for n, w in weights.items()}, ROUTER_WIDTH, EVERYTHING, SAMPLE)
    moved.update(tokens.x / scale, tokens.router_x, tokens.modality, tokens.keys)
    assert same(gathered(tokens).rescaled(scale), moved)


def test_a_scale_per_modality_moves_each_modality_by_its_own(
    tokens: TokenSample, weights: dict[str, Tensor], gathered: Callable[..., GroupStats], same: Same
) -> None:
    """Only text's is moved into the weights."""
    scale = 2.0 ** torch.randint(-6, 7, (2, WIDTH), generator=torch.Generator().manual_seed(5))
    needs = Needs(gram=True)  # counting top channels again would need both modalities in one metric
    moved = GroupStats.empty({n: w * scale[TEXT] for n, w in weights.items()}, ROUTER_WIDTH, needs, SAMPLE)
    moved.update(tokens.x / scale[tokens.modality.long()], tokens.router_x, tokens.modality, tokens.keys)
    assert same(gathered(tokens, needs=needs).rescaled(scale), moved)


def test_any_scale_moves_all_statistics(
    tokens: TokenSample, gathered: Callable[..., GroupStats], normal: Callable[..., Tensor]
) -> None:
    scale = normal(6, WIDTH).abs() + 0.1
    stats, x = gathered(tokens).rescaled(scale), tokens.x.double() / scale.double()
    assert torch.allclose(stats.mean_abs.double(), x.abs().mean(dim=0), rtol=1e-5)
    assert torch.allclose(stats.abs_max.amax(dim=0).double(), x.abs().amax(dim=0), rtol=1e-5)
    gram = x.T @ x
    size = gram.diagonal().sqrt()
    assert ((stats.total_gram.double() - gram) / size / size[:, None]).abs().max() < 1e-5
    order = tokens.keys.argsort()[:SAMPLE]
    assert torch.allclose(stats.sample.x.double(), x[order], rtol=1e-5)


def test_rescaling_does_not_change_the_original(
    tokens: TokenSample, gathered: Callable[..., GroupStats], same: Same
) -> None:
    stats = gathered(tokens)
    stats.rescaled(torch.full((WIDTH,), 3.0))
    assert same(stats, gathered(tokens))


def test_only_what_is_needed_is_kept(tokens: TokenSample, gathered: Callable[..., GroupStats]) -> None:
    stats = gathered(tokens, needs=Needs())
    assert stats.gram is None
    assert stats.top_count == {}
    assert stats.merge(gathered(tokens, needs=Needs())).gram is None
    assert stats.rescaled(torch.full((WIDTH,), 2.0)).gram is None
    with pytest.raises(AssertionError, match=r"needs\(\)"):
        _ = stats.total_gram
    with pytest.raises(AssertionError, match=r"needs\(\)"):
        _ = stats.frequency(48)


def test_what_is_held_out_is_in_nothing_but_its_own_sample(
    tokens: TokenSample, gathered: Callable[..., GroupStats], same: Same
) -> None:
    """And a token with a NaN is not even there."""
    seen, held = rows(tokens, slice(70)), rows(tokens, slice(70, None))
    held.x[3, 5] = torch.nan
    stats, none = gathered(seen), gathered(seen)
    for part in cut(held, [10, 11]):
        stats.hold_out(part.x, part.router_x, part.modality, part.keys)
    good = rows(held, torch.arange(len(held.keys)) != 3)
    assert same(stats.held_out, good.smallest(held_out_size(SAMPLE)))
    assert len(stats.held_out.keys) == SAMPLE // 8
    assert same(replace(stats, held_out=none.held_out), none)
    assert same(none.merge(stats).held_out, stats.held_out)
    scale = 2.0 ** torch.arange(2 * WIDTH).view(2, WIDTH).remainder(5)
    moved = stats.rescaled(scale).held_out
    assert torch.equal(moved.x * scale[moved.modality.long()], stats.held_out.x)


def test_the_needs_of_a_recipe_are_the_union_of_its_parts() -> None:
    assert Needs() | Needs() == Needs()
    eight, both = frozenset({8}), frozenset({8, 32})
    assert Needs(gram=True) | Needs(top_channels=eight) == Needs(gram=True, top_channels=eight)
    assert Needs(top_channels=frozenset({32})) | Needs(top_channels=eight) == Needs(top_channels=both)


def test_statistics_of_nothing_are_zero_and_finite(gathered: Callable[..., GroupStats]) -> None:
    nothing = gathered()
    assert nothing.num_tokens == 0
    assert not nothing.mean_abs.any()
    assert not nothing.frequency(48).any()
    assert nothing.sample.x.shape == (0, WIDTH)
