"""What travels between stages: the hidden states of some samples, and what the blocks need beside them."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

PADDING, TEXT, IMAGE = -1, 0, 1
MODALITIES = ("text", "image")
HELD_OUT = 16
"""One of so many calibration sequences is held out of all statistics: errors are measured on its tokens, too."""


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right; causal attention never looks at the padding, statistics skip it."""

    index: int
    """Position in the run; statistics are summed in this order."""
    hidden: Float[Tensor, "B L D"]
    modality: Int8[Tensor, "B L"]
    """PADDING, TEXT or IMAGE of every position."""
    sample_ids: Int[Tensor, " B"]
    context: Mapping[str, Tensor] = field(default_factory=dict)
    """Rotary tables [.., B or 1, L, _], and whatever else the blocks of the architecture ask for."""

    def with_hidden(self, hidden: Tensor) -> "Batch":
        """The batch with other hidden states [B, L, D]."""
        return replace(self, hidden=hidden)

    def take(self, rows: Int[Tensor, " R"]) -> "Batch":
        """Some of the samples of a joined batch, padded no further than the longest of them."""
        modality = self.modality[rows]
        length = int((modality != PADDING).sum(dim=1).max())
        context = {name: t.index_select(-3, rows).narrow(-2, 0, length) for name, t in self.context.items()}
        hidden = self.hidden[rows, :length]
        return replace(
            self, hidden=hidden, modality=modality[:, :length], sample_ids=self.sample_ids[rows], context=context
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with every tensor there; those that are there already are not copied."""
        context = {name: tensor.to(device) for name, tensor in self.context.items()}
        hidden, modality, ids = (t.to(device) for t in (self.hidden, self.modality, self.sample_ids))
        return replace(self, hidden=hidden, modality=modality, sample_ids=ids, context=context)

    @property
    def num_tokens(self) -> int:
        """The number of tokens, without padding."""
        return int((self.modality != PADDING).sum())

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(t.nbytes for t in self.tensors().values())

    def token_keys(self) -> Int[Tensor, "B L"]:
        """A pseudo-random 63-bit number per token that depends on nothing but sample id and position."""
        positions = torch.arange(self.modality.shape[1], device=self.modality.device)
        return _mix(sample_keys(self.sample_ids)[:, None] + positions)

    def held_out(self, below: int) -> Bool[Tensor, "B L"]:
        """Whether a position is one of a sequence whose key is below this one (`held_out_below`)."""
        return (sample_keys(self.sample_ids) < below)[:, None].expand(self.modality.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Named tensors for a safetensors file; `from_tensors` is the inverse."""
        context = {f"context.{k}": v.contiguous() for k, v in self.context.items()}
        return {
            "index": torch.tensor(self.index),
            "hidden": self.hidden.contiguous(),
            "modality": self.modality.contiguous(),
            "sample_ids": self.sample_ids.contiguous(),
            **context,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """How pickle stores it: on a CPU as arrays, which Ray moves without a copy; tensors it would copy twice."""
        if self.hidden.is_cuda:
            return Batch.from_tensors, (self.tensors(),)
        arrays = {
            n: (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy() for n, t in self.tensors().items()
        }
        return _from_arrays, (arrays, {n: t.dtype for n, t in self.tensors().items()})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Batch":
        """The batch whose `tensors` these are."""
        context = {k[8:]: v for k, v in tensors.items() if k.startswith("context.")}
        return cls(
            int(tensors["index"]),
            tensors["hidden"],
            tensors["modality"],
            tensors["sample_ids"],
            context,
        )


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of the samples of all of these, padded to the longest, with tables for each sample; for decoders that
    read tables alone. Its index is that of the first."""
    length = max(batch.modality.shape[1] for batch in batches)

    def rows_of(batch: Batch, name: str) -> Tensor:
        """A table with a row for each sample: whether one serves all, a batch of one sample does not tell."""
        table = batch.context[name]
        return _padded(table.expand(*table.shape[:-3], len(batch.sample_ids), -1, -1), -2, length)

    return Batch(
        batches[0].index,
        torch.cat([_padded(batch.hidden, 1, length) for batch in batches]),
        torch.cat([_padded(batch.modality, 1, length, PADDING) for batch in batches]),
        torch.cat([batch.sample_ids for batch in batches]),
        {name: torch.cat([rows_of(batch, name) for batch in batches], dim=-3) for name in batches[0].context},
    )


def _padded(tensor: Tensor, dim: int, length: int, value: int = 0) -> Tensor:
    """The tensor with `value` behind it until a dimension has this length."""
    shape = list(tensor.shape)
    shape[dim] = length - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_full(shape, value)], dim=dim)


def sample_keys(ids: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """A pseudo-random 63-bit number per sample that depends on nothing but its id."""
    return _mix(ids.long() + 1)


def held_out_below(num_samples: int) -> int:
    """The key below which samples are held out: of samples 0 .. num_samples - 1 that is one in HELD_OUT, and none of
    fewer."""
    count = num_samples // HELD_OUT
    return int(sample_keys(torch.arange(num_samples)).sort().values[count]) if count else 0


def _from_arrays(arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, torch.dtype]) -> Batch:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that they are read-only; nobody writes into a batch
        return Batch.from_tensors({n: torch.from_numpy(a).view(dtypes[n]) for n, a in arrays.items()})


def _mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 on int64 (multiplication wraps), made non-negative."""
    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return (x ^ (x >> 31)) & 0x7FFF_FFFF_FFFF_FFFF
