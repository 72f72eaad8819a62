"""What samples amount to."""

import math
from dataclasses import replace

import pytest

from qe_dist.checkpoint.quality import Quality, SampleScore, difference, too_few


@pytest.fixture
def quality():
    """Twelve questions with images, twelve texts; of the texts every token costs ln 2 and a KL of 0.5."""
    asked = [SampleScore(i, "digit", "image", 3, i % 4 > 0, 3 * math.log(4), 0.3, 2) for i in range(12)]
    plain = [
        SampleScore(12 + i, "text", "text", 10 + i, False, (10 + i) * math.log(2), (10 + i) / 2, 5) for i in range(12)
    ]
    return Quality([*asked, *plain])


def test_sums_over_tokens_by_kind_modality_and_over_all(quality):
    summary = quality.summary()
    tokens = 36 + sum(range(10, 22))
    assert (summary["samples"], summary["tokens"]) == (24, tokens)
    assert summary["kl"] == pytest.approx((12 * 0.3 + (tokens - 36) / 2) / tokens)
    assert summary["accuracy"] == 0.75
    assert summary["agreement"] == pytest.approx((24 + 60) / tokens)
    assert summary["kinds"]["text"]["perplexity"] == pytest.approx(2)
    assert summary["modalities"]["image"]["perplexity"] == pytest.approx(4)
    assert summary["kinds"]["digit"]["kl"] == pytest.approx(0.1)
    assert "accuracy" not in summary["kinds"]["text"]
    low, high = summary["intervals"]["kl"]
    assert low < summary["kl"] < high


def test_numbers_of_samples_survive_a_file(quality):
    assert Quality.from_columns(quality.columns()).scores == quality.scores


def test_without_a_reference_there_is_no_kl(quality):
    alone = Quality([replace(score, kl=None, agreed=None) for score in quality.scores]).summary()
    assert "kl" not in alone
    assert "agreement" not in alone
    assert alone["perplexity"] == quality.summary()["perplexity"]


def test_a_difference_is_paired(quality):
    better = Quality([replace(score, kl=0.9 * score.kl) for score in quality.scores])
    gap, (low, high) = difference("kl", better, quality)
    assert gap == pytest.approx(-0.1 * quality.summary()["kl"])
    assert low < gap < high < 0
    with pytest.raises(ValueError, match="same samples"):
        difference("kl", better, Quality(quality.scores[1:]))


def test_too_few_samples_are_said():
    assert too_few(10) is None
    assert "too few samples for an interval: 9," in too_few(9)
    few = Quality([SampleScore(i, "text", "text", 3, True, 1.0, 0.1, 3) for i in range(9)])
    assert few.summary()["intervals"]["kl"] is None
