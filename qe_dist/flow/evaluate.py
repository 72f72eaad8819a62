"""Quality of a model: exact match of greedy answers, text perplexity, and KL against a reference.

One forward pass per sample suffices: greedy decoding gives exactly the reference answer iff, reading that
answer, every one of its tokens (and the end mark) is the arg max. A test holds this against `generate`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qe_dist.archs.base import Arch
from qe_dist.core.sample import Example


@dataclass
class Tally:
    """Sums over the samples of one kind."""

    samples: int = 0
    exact: int = 0
    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0


@dataclass
class Quality:
    kinds: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    has_reference: bool = False

    def _sum(self, kinds: Sequence[str], name: str) -> float:
        return sum(getattr(self.kinds[k], name) for k in kinds)

    def summary(self) -> dict[str, Any]:
        """Accuracy over all questions, perplexity over all plain text, KL over everything predicted."""
        asked = [k for k in self.kinds if k != "text"]
        every = list(self.kinds)
        result: dict[str, Any] = {"samples": int(self._sum(every, "samples"))}
        if asked:
            result["accuracy"] = self._sum(asked, "exact") / self._sum(asked, "samples")
        if "text" in self.kinds:
            result["perplexity"] = math.exp(self.kinds["text"].nll / self.kinds["text"].tokens)
        if self.has_reference:
            result["kl"] = self._sum(every, "kl") / self._sum(every, "tokens")
        result["kinds"] = {k: self._kind(k) for k in sorted(every)}
        return result

    def _kind(self, kind: str) -> dict[str, Any]:
        tally = self.kinds[kind]
        row: dict[str, Any] = {"samples": tally.samples}
        if kind == "text":
            row["perplexity"] = math.exp(tally.nll / tally.tokens)
        else:
            row["accuracy"] = tally.exact / tally.samples
        if self.has_reference:
            row["kl"] = tally.kl / tally.tokens
        return row


Predictions = Mapping[int, Tensor]
"""Log-probabilities wherever an example (by its index) predicts something. [P, V]"""


def evaluate(
    model: Any, arch: Arch, examples: Sequence[Example], reference: Predictions | None = None, batch: int = 32
) -> Quality:
    """Quality of a loaded model on encoded samples; with another model's predictions, its KL divergence from them too.

    Give `predictions` of the reference once to as many models as there are: the two need not fit into memory together.
    """
    quality = Quality(has_reference=reference is not None)
    for example, mine in _predicted(model, arch, examples, batch):
        _count(quality.kinds[example.kind], example, mine, None if reference is None else reference[example.index])
    return quality


def predictions(model: Any, arch: Arch, examples: Sequence[Example], batch: int = 32) -> Predictions:
    """What a model predicts, on CPU."""
    return {example.index: mine.cpu() for example, mine in _predicted(model, arch, examples, batch)}


@torch.no_grad()
def _predicted(model: Any, arch: Arch, examples: Sequence[Example], batch: int) -> Iterator[tuple[Example, Tensor]]:
    for part in _batches(examples, batch):
        logp = _log_probabilities(model, arch.model_inputs(part, pad=0))
        for row, example in enumerate(part):
            yield example, logp[row][_places(example).to(logp.device)]


def _places(example: Example) -> Tensor:
    """Position t predicts token t + 1."""
    return (example.labels[1:] != -100).nonzero().squeeze(1)


def _batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Of similar length, so that little is padded."""
    ordered = sorted(examples, key=lambda e: e.input_ids.numel())
    for i in range(0, len(ordered), size):
        yield ordered[i : i + size]


def _log_probabilities(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[B, L, V] in float32. Padding is on the right, where causal attention does not see it."""
    inputs = {k: v.to(model.device) for k, v in inputs.items()}
    return F.log_softmax(model(**inputs, use_cache=False).logits.float(), dim=-1)


def _count(tally: Tally, example: Example, mine: Tensor, reference: Tensor | None) -> None:
    wanted = example.labels[1:][_places(example)].to(mine.device)
    tally.samples += 1
    tally.tokens += len(wanted)
    tally.exact += int((mine.argmax(dim=-1) == wanted).all())
    tally.nll -= float(mine.gather(1, wanted[:, None]).sum())
    if reference is not None:
        other = reference.to(mine.device)
        tally.kl += float((other.exp() * (other - mine)).sum())
