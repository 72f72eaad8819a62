"""Where a model can be rotated so that it stays the same function, by name and without a weight in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Space = Literal["stream", "head"]
"""The residual stream, or the values of one attention head; a rotation has one matrix for each."""


@dataclass(frozen=True)
class RotatedTensor:
    """A tensor of the rotated model: T' = R_rowsᵀ T diag(gain) R_columns. A bias has rows only."""

    source: str
    """The tensor that it is made of."""
    rows: Space | None = None
    """What its outputs are written to."""
    columns: Space | None = None
    """What its inputs are read from."""
    gain: str | None = None
    """The weight of the norm in front of it, which moves into it."""
    stored: bool = False
    """It goes into the checkpoint as it is, in the source's dtype; calibration shall see what is stored."""


@dataclass(frozen=True)
class RotationSites:
    """Everything in a model that a rotation changes."""

    config: Mapping[str, Any]
    """`config.json` of the rotated model."""
    widths: Mapping[Space, int]
    norms: frozenset[str]
    """Weights of the norms that read the stream: what a rotation would mix of them moves into the linears behind."""
    tensors: Mapping[str, RotatedTensor]
    gain_offset: float = 0.0
    """What these norms add to their weights, which makes the gain."""
