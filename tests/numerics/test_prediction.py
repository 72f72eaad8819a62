"""Scores of tokens against log-probabilities in float64, made whole."""

import pytest
import torch

from qe_dist.numerics import prediction
from qe_dist.numerics.prediction import Head, score_tokens

TOKENS, VOCABULARY = 23, 300


def logp(hidden, weight):
    return (hidden.double() @ weight.double().T).log_softmax(dim=1)


@pytest.fixture(params=[2**26, 4 * VOCABULARY * 7, 1])
def few_logits(request, monkeypatch):
    """All tokens at once, seven, or one at a time; the head in slices of 16 rows."""
    monkeypatch.setattr(prediction, "LOGIT_BYTES", request.param)
    monkeypatch.setattr(prediction, "SLICE_BYTES", 4 * 12 * 16)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_scores_are_those_of_whole_log_probabilities(few_logits, normal, scale):
    mine, theirs = normal(0, TOKENS, 12), normal(1, TOKENS, 20)
    weight, other = normal(2, VOCABULARY, 12) * scale, normal(3, VOCABULARY, 20) * scale
    wanted = torch.arange(TOKENS) * 13 % VOCABULARY
    found = score_tokens(mine, Head.of(weight), wanted, (theirs, Head.of(other)))
    q, p = logp(mine, weight), logp(theirs, other)
    torch.testing.assert_close(found.nll.double(), -q[range(TOKENS), wanted], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.kl.double(), (p.exp() * (p - q)).sum(dim=1), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.agrees, p.argmax(dim=1) == q.argmax(dim=1))
    assert torch.equal(found.right, q.argmax(dim=1) == wanted)
    assert not found.agrees.all()


def test_a_small_divergence_is_not_lost_in_rounding(normal):
    """Both logits are about 100, their distributions differ by 1e-5."""
    mine, weight = normal(0, TOKENS, 12), normal(2, VOCABULARY, 12) + 30.0
    changed = weight * (1 + 1e-4 * normal(4, VOCABULARY, 12))
    found = score_tokens(mine, Head.of(changed), torch.zeros(TOKENS, dtype=torch.int64), (mine, Head.of(weight)))
    p, q = logp(mine, weight), logp(mine, changed)
    torch.testing.assert_close(found.kl.double().mean(), (p.exp() * (p - q)).sum(dim=1).mean(), rtol=0.05, atol=0)


def test_what_cannot_be_scored_is_refused(normal):
    head, wanted = Head.of(normal(0, 8, 4)), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="8 and 9 tokens"):
        score_tokens(normal(1, 3, 4), head, wanted, (normal(1, 3, 4), Head.of(normal(0, 9, 4))))
    with pytest.raises(ValueError, match="no token"):
        score_tokens(normal(1, 0, 4), head, wanted[:0])
