"""How well final hidden states predict the next token, and how far one model's predictions are from another's.

Logits are [T, V], and V is 150,000 in a small Qwen: they are made for a few tokens at a time and forgotten.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LOGIT_BYTES = 2**27
"""Of one matrix of logits; at most three live at a time."""
SLICE_BYTES = 2**26
"""Of the rows of a head that are in float32 at a time."""


@dataclass(frozen=True)
class Head:
    """The output embeddings [V, D] of a model, which follow its last norm, as consecutive slices of rows: they may lie
    on disk, or in 16 bits, and need not exist in float32 as a whole."""

    vocabulary: int
    width: int
    slices: Callable[[], Iterator[Float[Tensor, "R D"]]]

    @classmethod
    def of(cls, weight: Float[Tensor, "V D"]) -> "Head":
        """Of a weight in memory."""
        return cls(*weight.shape, lambda: iter(weight.split(slice_rows(weight.shape[1]))))


def slice_rows(width: int) -> int:
    """Rows of a slice of a head of this width."""
    return max(1, SLICE_BYTES // (4 * width))


@dataclass(frozen=True)
class TokenScores:
    """Of every token that is predicted."""

    nll: Float[Tensor, " T"]
    """Negative log-likelihood, in nats."""
    right: Bool[Tensor, " T"]
    """Whether the token is the most likely one."""
    kl: Float[Tensor, " T"] | None = None
    """KL(reference || model), in nats."""
    agrees: Bool[Tensor, " T"] | None = None
    """Whether both think the same token the most likely."""


def score_tokens(
    hidden: Float[Tensor, "T D"],
    head: Head,
    wanted: Int[Tensor, " T"],
    reference: tuple[Float[Tensor, "T H"], Head] | None = None,
) -> TokenScores:
    """Scores of the tokens `wanted`, predicted from hidden states behind the last norm, in float32.

    reference: the other model's hidden states at the same places, and its head, of the same vocabulary.
    Peak memory: four times LOGIT_BYTES, and a slice of each head. ValueError where the vocabularies differ.
    """
    if reference is not None and reference[1].vocabulary != head.vocabulary:
        raise ValueError(f"the vocabularies have {head.vocabulary} and {reference[1].vocabulary} tokens")
    size = max(1, LOGIT_BYTES // (4 * head.vocabulary))
    parts = []
    for i in range(0, len(hidden), size):
        here = slice(i, i + size)
        other = None if reference is None else _log_probabilities(reference[0][here], reference[1])
        parts.append(_scores(_log_probabilities(hidden[here], head), wanted[here], other))
    if not parts:
        raise ValueError("there is no token to score")
    columns = zip(*((part.nll, part.right, part.kl, part.agrees) for part in parts), strict=True)
    return TokenScores(*(None if column[0] is None else torch.cat(column) for column in columns))


def _log_probabilities(hidden: Tensor, head: Head) -> Float[Tensor, "T V"]:
    hidden = hidden.float()
    logits = hidden.new_empty((len(hidden), head.vocabulary))
    begin = 0
    for rows in head.slices():
        end = begin + len(rows)
        logits[:, begin:end] = hidden @ rows.to(hidden).T
        begin = end
    return logits.sub_(logits.logsumexp(dim=1, keepdim=True))


def _scores(mine: Float[Tensor, "T V"], wanted: Int[Tensor, " T"], other: Float[Tensor, "T V"] | None) -> TokenScores:
    """Overwrites both log-probabilities."""
    best = mine.argmax(dim=1)
    nll, right = -mine.gather(1, wanted[:, None]).squeeze(1), best == wanted
    if other is None:
        return TokenScores(nll, right)
    agrees = other.argmax(dim=1) == best
    difference = mine.neg_().add_(other)
    kl = other.exp_().mul_(difference).sum(dim=1)
    return TokenScores(nll, right, kl, agrees)
