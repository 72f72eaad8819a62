"""Statistics of the tensor that the linears of a group read: gathered in one pass, and parts can be merged.

All of them are sums, maxima or a bottom-k sample, so parts merge exactly; adding in batch order makes the
last bits equal as well. Rows with a NaN or Inf are counted and left out, never summed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from qe_dist.core.batch import MODALITIES, TEXT
from qe_dist.numerics.gram import add_gram
from qe_dist.numerics.lowrank import capped

M = len(MODALITIES)
HELD_OUT_SHARE = 8
"""The sample of held-out tokens has the size of the token sample divided by this number."""


@dataclass(frozen=True)
class Needs:
    """The statistics that a recipe asks for, beside the token sample."""

    gram: bool = False
    top_channels: frozenset[int] = frozenset()
    """The k for which it is counted how often a channel is among the k most important ones of a token."""
    images: bool = False
    """Whether image tokens are needed: samples without any are refused before the run begins."""

    def __or__(self, other: "Needs") -> "Needs":
        top = self.top_channels | other.top_channels
        return Needs(self.gram or other.gram, top, self.images or other.images)


@dataclass(frozen=True)
class TokenSample:
    """The tokens with the smallest keys, which are the same whatever the batches, stages or workers."""

    keys: Int[Tensor, " S"]
    x: Float[Tensor, "S I"]
    router_x: Float[Tensor, "S H"]
    """The same tokens at the input that the router reads."""
    modality: Int8[Tensor, " S"]

    def smallest(self, count: int) -> "TokenSample":
        """The `count` tokens with the smallest keys, in the order of their keys."""
        order = self.keys.argsort(stable=True)[:count]
        return TokenSample(self.keys[order], self.x[order], self.router_x[order], self.modality[order])

    def joined(self, other: "TokenSample") -> "TokenSample":
        """The tokens of both, one after the other."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return TokenSample(*(torch.cat(pair) for pair in pairs))

    def smallest_with(self, other: "TokenSample", count: int) -> "TokenSample":
        """The smallest of both; `self` is in order, as `smallest` left it. Copies only what has a chance to come in:
        next to nothing of a batch, once the sample is full."""
        if 0 < count == len(self.keys):
            may = other.keys < self.keys[-1]
            other = TokenSample(other.keys[may], other.x[may], other.router_x[may], other.modality[may])
        return self.joined(other.smallest(count)).smallest(count)


def held_out_size(sample_size: int) -> int:
    """Size of the sample of held-out tokens, beside a token sample of so many."""
    return max(1, sample_size // HELD_OUT_SHARE)


def _finite(tokens: TokenSample) -> tuple[TokenSample, int]:
    """(the tokens without those that have a NaN or Inf, the number of those)"""
    finite = torch.isfinite(tokens.x).all(dim=1) & torch.isfinite(tokens.router_x).all(dim=1)
    if finite.all():
        return tokens, 0
    return TokenSample(*(field[finite] for field in vars(tokens).values())), int((~finite).sum())


@dataclass
class GroupStats:
    """Accumulates over batches; every per-channel field has a row per modality."""

    needs: Needs
    sample_size: int
    count: Int[Tensor, " M"]
    nonfinite: int
    abs_sum: Float[Tensor, "M I"]
    abs_max: Float[Tensor, "M I"]
    gram: Float[Tensor, "M I I"] | None
    top_count: Mapping[int, Int[Tensor, "M I"]]
    """How often each channel was among the k most important ones of a token, for each k of `needs.top_channels`."""
    sample: TokenSample
    held_out: TokenSample
    """Tokens of held-out sequences, which are in no other statistic; errors are measured on them. May be empty."""
    importance: Float[Tensor, " I"] = field(repr=False)
    """Mean |W| of each input channel over the group's linears: importance of a token's channel is |x| times it."""

    @classmethod
    def empty(
        cls,
        weights: Mapping[str, Float[Tensor, "_ I"]],
        router_width: int,
        needs: Needs,
        sample_size: int,
        gram_on: str | torch.device | None = None,
    ) -> "GroupStats":
        """Statistics of no tokens. gram_on: device of the Gram matrices; None for that of the weights."""

        stacked = list(weights.values())
        width, device = stacked[0].shape[1], stacked[0].device

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        def no_tokens() -> TokenSample:
            ints, modality = zeros(0, dtype=torch.int64), zeros(0, dtype=torch.int8)
            return TokenSample(ints, zeros(0, width), zeros(0, router_width), modality)

        total = zeros(width, dtype=torch.float64)
        for weight in stacked:
            total += weight.abs().sum(dim=0, dtype=torch.float64)
        importance = (total / sum(w.shape[0] for w in stacked)).float()
        return cls(
            needs=needs,
            sample_size=sample_size,
            count=zeros(M, dtype=torch.int64),
            nonfinite=0,
            abs_sum=zeros(M, width, dtype=torch.float64),
            abs_max=zeros(M, width),
            gram=torch.zeros(M, width, width, device=gram_on or device) if needs.gram else None,
            top_count={k: zeros(M, width, dtype=torch.int64) for k in sorted(needs.top_channels)},
            sample=no_tokens(),
            held_out=no_tokens(),
            importance=importance,
        )

    @torch.no_grad()
    def update(
        self,
        x: Float[Tensor, "T I"],
        router_x: Float[Tensor, "T H"],
        modality: Int8[Tensor, " T"],
        keys: Int[Tensor, " T"],
    ) -> None:
        """Adds the tokens of one batch, without padding. Their dtype is kept, since a wider copy costs memory."""
        tokens, bad = _finite(TokenSample(keys, x, router_x, modality))
        self.nonfinite += bad
        x, modality = tokens.x, tokens.modality
        for m in range(M):
            rows = (modality == m).nonzero().squeeze(1)
            if rows.numel() == 0:
                continue
            own = x if rows.numel() == len(x) else x[rows]
            magnitude = own.abs()
            self.count[m] += rows.numel()
            self.abs_sum[m] += magnitude.sum(dim=0, dtype=torch.float64)
            self.abs_max[m] = torch.maximum(self.abs_max[m], magnitude.amax(dim=0))
            if self.gram is not None:
                add_gram(self.gram[m], own)
            score = magnitude * self.importance if self.top_count else magnitude
            for k, count in self.top_count.items():
                top = score.topk(capped(x.shape[1], k), dim=1).indices
                count[m] += torch.bincount(top.flatten(), minlength=x.shape[1])
        self.sample = self.sample.smallest_with(tokens, self.sample_size)

    @torch.no_grad()
    def hold_out(
        self,
        x: Float[Tensor, "T I"],
        router_x: Float[Tensor, "T H"],
        modality: Int8[Tensor, " T"],
        keys: Int[Tensor, " T"],
    ) -> None:
        """Adds tokens of held-out sequences, to `held_out` alone."""
        tokens, _ = _finite(TokenSample(keys, x, router_x, modality))
        self.held_out = self.held_out.smallest_with(tokens, held_out_size(self.sample_size))

    def merge(self, other: "GroupStats") -> "GroupStats":
        """The statistics of both parts together."""

        def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else a + b

        return replace(
            self,
            count=self.count + other.count,
            nonfinite=self.nonfinite + other.nonfinite,
            abs_sum=self.abs_sum + other.abs_sum,
            abs_max=torch.maximum(self.abs_max, other.abs_max),
            gram=add(self.gram, other.gram),
            top_count={k: count + other.top_count[k] for k, count in self.top_count.items()},
            sample=self.sample.smallest_with(other.sample, self.sample_size),
            held_out=self.held_out.smallest_with(other.held_out, held_out_size(self.sample_size)),
        )

    @property
    def num_tokens(self) -> int:
        """The number of tokens in the statistics, without held-out ones."""
        return int(self.count.sum())

    @property
    def mean_abs(self) -> Float[Tensor, " I"]:
        """Mean |x| of each channel over all tokens."""
        return (self.abs_sum.sum(dim=0) / max(1, self.num_tokens)).float()

    @property
    def total_gram(self) -> Float[Tensor, "I I"]:
        """X^T X of all tokens, text and images together."""
        assert self.gram is not None, "the recipe did not ask for Gram matrices in needs()"
        return self.gram.sum(dim=0)

    def frequency(self, k: int) -> Float[Tensor, " I"]:
        """Fraction of tokens for which a channel is among the k most important ones (QE, f_c); k is cut on narrow
        layers."""
        assert k in self.top_count, f"the recipe did not ask for top_channels {k} in needs()"
        return self.top_count[k].sum(dim=0).double() / max(1, self.num_tokens)

    def rescaled(self, scale: Float[Tensor, "*M I"]) -> "GroupStats":
        """The statistics of x / scale, one scale or one per modality, with weights that are multiplied by text's."""
        scale = scale.view(-1, scale.shape[-1])

        def moved(tokens: TokenSample) -> TokenSample:
            return replace(tokens, x=tokens.x / (scale if len(scale) == 1 else scale[tokens.modality.long()]))

        gram = None if self.gram is None else (self.gram / scale[:, None]).div_(scale[:, :, None])
        return replace(
            self,
            abs_sum=self.abs_sum / scale,
            abs_max=self.abs_max / scale,
            gram=gram,
            sample=moved(self.sample),
            held_out=moved(self.held_out),
            importance=self.importance * scale[TEXT],
        )

    def without(self, channels: Int[Tensor, " C"]) -> "GroupStats":
        """The statistics as if these channels were silent. The Gram matrix keeps them: a weight that does not read a
        channel does not see its rows, and a copy would be dear."""
        return replace(
            self,
            abs_sum=self.abs_sum.index_fill(1, channels, 0.0),
            abs_max=self.abs_max.index_fill(1, channels, 0.0),
            top_count={k: count.index_fill(1, channels, 0) for k, count in self.top_count.items()},
            sample=replace(self.sample, x=self.sample.x.index_fill(1, channels, 0.0)),
            importance=self.importance.index_fill(0, channels, 0.0),
        )
