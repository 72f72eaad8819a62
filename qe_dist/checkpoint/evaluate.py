"""Quality of a model: exact match of greedy answers, perplexity, and KL and agreement with a reference.

One forward pass per sample suffices: greedy decoding gives exactly the reference answer iff, reading that
answer, every one of its tokens (and the end mark) is the arg max. A test holds this against `generate`.

Nothing of [tokens, vocabulary] is kept. A reference leaves its final hidden states, where something is predicted, and
its head on disk (`save_reference`); whoever is compared with it reads them sample by sample, and both heads are applied
to a few tokens at a time.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qe_dist.archs.base import Family
from qe_dist.checkpoint.encoded import lengths_of
from qe_dist.checkpoint.quality import Quality, SampleScore
from qe_dist.core.batch import IMAGE, MODALITIES
from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import Example
from qe_dist.io.states import States, StatesWriter
from qe_dist.numerics.prediction import Head, TokenScores, score_tokens

BATCH_TOKENS = 2048
"""Tokens of a batch at most, padding included; a longer sample goes alone."""


class Predictor(Protocol):
    """A model that reads samples."""

    @property
    def head(self) -> Head: ...

    def states(self, examples: Sequence[Example], tokens: int) -> Iterator[list[tuple[Example, Tensor]]]:
        """Batches of at most so many tokens: each sample, and its hidden states behind the last norm wherever a token
        is predicted. [P, D]"""
        ...


class WholeModel:
    """A loaded Hugging Face model, as transformers runs it."""

    def __init__(self, model: Any, arch: Family) -> None:
        self.model, self.arch = model, arch

    @property
    def head(self) -> Head:
        head = self.model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise ConfigError(f"{self.model.name_or_path} has a head with a bias, which evaluation does not know")
        return Head.of(head.weight.detach())

    @torch.no_grad()
    def states(self, examples: Sequence[Example], tokens: int) -> Iterator[list[tuple[Example, Tensor]]]:
        """Padding is on the right, where causal attention does not see it."""
        for chosen in batches(lengths_of(examples), tokens):
            part = [examples[i] for i in chosen]
            inputs = {k: v.to(self.model.device) for k, v in self.arch.model_inputs(part, pad=0).items()}
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            yield [(one, hidden[row][places(one).to(hidden.device)]) for row, one in enumerate(part)]


def evaluate(
    model: Any,
    arch: Family,
    examples: Sequence[Example],
    reference: Path | None = None,
    tokens: int = BATCH_TOKENS,
) -> Quality:
    """Quality of a loaded model on encoded samples; with a reference's folder (`save_reference`), its KL divergence
    from it and their agreement, too."""
    return measure(WholeModel(model, arch), examples, reference, tokens)


def save_reference(model: Any, arch: Family, examples: Sequence[Example], folder: Path) -> Path:
    """Writes into `folder` what `evaluate` compares others with. Returns the folder."""
    return save_states(WholeModel(model, arch), examples, folder)


def save_states(model: Predictor, examples: Sequence[Example], folder: Path, tokens: int = BATCH_TOKENS) -> Path:
    """The same of any predictor."""
    writer = StatesWriter(folder)
    for part in model.states(examples, tokens):
        writer.put({example.index: hidden.cpu() for example, hidden in part})
    writer.finish(model.head.slices())
    return folder


def measure(
    model: Predictor, examples: Sequence[Example], reference: Path | None = None, tokens: int = BATCH_TOKENS
) -> Quality:
    """The same as `evaluate` of any predictor."""
    head, other = model.head, None if reference is None else States(reference)
    other_head = None if other is None else _head_of(other, head)
    scores: list[SampleScore] = []
    for part in model.states(examples, tokens):
        hidden = torch.cat([own for _, own in part])
        wanted = torch.cat([example.labels[1:][places(example)] for example, _ in part]).to(hidden.device)
        theirs = None
        if other is not None and other_head is not None:
            theirs = torch.cat([other.get(example.index) for example, _ in part]).to(hidden.device), other_head
            if len(theirs[0]) != len(hidden):
                raise ConfigError(f"{other.folder} was made from other samples, or by another tokenizer")
        scores += _by_sample(part, score_tokens(hidden, head, wanted, theirs))
    return Quality(sorted(scores, key=lambda score: score.index))


def _head_of(other: States, mine: Head) -> Head:
    """The head of the reference; that of the model where they are equal, which need not be read again and again."""
    if other.vocabulary != mine.vocabulary:
        raise ConfigError(
            f"the reference predicts {other.vocabulary} tokens and the model {mine.vocabulary}: these are different "
            "vocabularies, whose distributions cannot be compared"
        )
    if other.width == mine.width:
        pairs = zip(other.head(), mine.slices(), strict=True)
        if all(torch.equal(a.to(b), b) for a, b in pairs):
            return mine
    return Head(other.vocabulary, other.width, other.head)


def _by_sample(part: Sequence[tuple[Example, Tensor]], scores: TokenScores) -> Iterator[SampleScore]:
    begin = 0
    for example, hidden in part:
        here = slice(begin, begin := begin + len(hidden))
        has_image = bool((example.modality == IMAGE).any())
        yield SampleScore(
            index=example.index,
            kind=example.kind,
            modality=MODALITIES[has_image],
            tokens=len(hidden),
            exact=bool(scores.right[here].all()),
            nll=_sum(scores.nll[here]),
            kl=None if scores.kl is None else _sum(scores.kl[here]),
            agreed=None if scores.agrees is None else int(scores.agrees[here].sum()),
        )


def _sum(values: Tensor) -> float:
    return float(values.double().sum())


def places(example: Example) -> Tensor:
    """Position t predicts token t + 1."""
    return (example.labels[1:] != -100).nonzero().squeeze(1)


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Positions of samples of similar length, so that little is padded; each batch has at most so many tokens,
    padding included, or one sample."""
    part: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if part and (len(part) + 1) * lengths[i] > tokens:
            yield part
            part = []
        part.append(i)
    if part:
        yield part
