"""How well final hidden states predict the next token, and how far one model's predictions are from another's.

Logits are [T, V], and V is 150,000 in a small Qwen: they are made for a few tokens at a time and forgotten.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LOGIT_BYTES = 2**26
"""Bytes of one matrix of logits; there are three at a time."""
SLICE_BYTES = 2**26
"""Bytes of the rows of a head that are in float32 at a time."""


@dataclass(frozen=True)
class Head:
    """The output embeddings [V, D] of a model, which follow its last norm, as consecutive slices of rows: they may lie
    on disk, or in 16 bits, and need not exist in float32 as a whole."""

    vocabulary: int
    width: int
    slices: Callable[[], Iterator[Float[Tensor, "R D"]]]

    @classmethod
    def of(cls, weight: Float[Tensor, "V D"]) -> "Head":
        """The head whose weight is in memory."""
        vocabulary, width = weight.shape
        return cls(vocabulary, width, lambda: iter(weight.split(slice_rows(width))))


def slice_rows(width: int) -> int:
    """Rows of a slice of a head of this width."""
    return max(1, SLICE_BYTES // (4 * width))


@dataclass(frozen=True)
class TokenScores:
    """How every predicted token was scored."""

    nll: Float[Tensor, " T"]
    """Negative log-likelihood, in nats."""
    right: Bool[Tensor, " T"]
    """Whether the token is the most likely one."""
    kl: Float[Tensor, " T"] | None = None
    """KL(reference || model), in nats."""
    agrees: Bool[Tensor, " T"] | None = None
    """Whether the same token is the most likely one for both models."""


def score_tokens(
    hidden: Float[Tensor, "T D"],
    head: Head,
    wanted: Int[Tensor, " T"],
    reference: tuple[Float[Tensor, "T H"], Head] | None = None,
) -> TokenScores:
    """Scores of the tokens `wanted`, predicted from hidden states behind the last norm, in float32.

    reference: the other model's hidden states at the same places, and its head, of the same vocabulary.
    Peak memory: three times LOGIT_BYTES, and a slice of each head. ValueError where the vocabularies differ.
    """
    if reference is not None and reference[1].vocabulary != head.vocabulary:
        raise ValueError(f"the vocabularies have {head.vocabulary} and {reference[1].vocabulary} tokens")
    if not len(hidden):
        raise ValueError("there is no token to score")
    size = min(len(hidden), max(1, LOGIT_BYTES // (4 * head.vocabulary)))
    memory = torch.empty(2 if reference is None else 3, size, head.vocabulary, device=hidden.device)
    parts = []
    for i in range(0, len(hidden), size):
        here = slice(i, i + size)
        other = None if reference is None else (reference[0][here].float(), reference[1])
        parts.append(_scores(hidden[here].float(), head, wanted[here], other, memory))
    nll, right = torch.cat([part.nll for part in parts]), torch.cat([part.right for part in parts])
    return TokenScores(nll, right, _joined(part.kl for part in parts), _joined(part.agrees for part in parts))


def _joined(columns: Iterable[Tensor | None]) -> Tensor | None:
    """The columns one after the other; None where there are none."""
    known = [column for column in columns if column is not None]
    return torch.cat(known) if known else None


def _scores(
    hidden: Tensor, head: Head, wanted: Tensor, reference: tuple[Tensor, Head] | None, memory: Float[Tensor, "N C V"]
) -> TokenScores:
    """Scores of at most C tokens. With logits a of the reference and b of the model, each less its greatest, KL is sum
    p (a - b) - log sum exp a + log sum exp b, where p is softmax(a); memory is used again and again."""
    scratch, mine, *others = memory[:, : len(hidden)]
    best = _logits(hidden, head, mine)
    total = torch.exp(mine, out=scratch).sum(dim=1).log()
    nll, right = total - mine.gather(1, wanted[:, None]).squeeze(1), best == wanted
    if reference is None:
        return TokenScores(nll, right)
    theirs = others[0]
    agrees = _logits(*reference, theirs) == best
    weights = torch.exp(theirs, out=scratch)
    sums = weights.sum(dim=1)
    apart = theirs.sub_(mine).sub_((sums.log() - total)[:, None])
    return TokenScores(nll, right, apart.mul_(weights).sum(dim=1) / sums, agrees)


def _logits(hidden: Float[Tensor, "T D"], head: Head, out: Float[Tensor, "T V"]) -> Int[Tensor, " T"]:
    """Writes the logits of every token less the greatest of them. Returns which one that is."""
    begin = 0
    for rows in head.slices():
        end = begin + len(rows)
        torch.mm(hidden, rows.to(hidden).T, out=out[:, begin:end])
        begin = end
    greatest, best = out.max(dim=1, keepdim=True)
    out.sub_(greatest)
    return best.squeeze(1)
