"""Calibration and evaluation data before and after tokenization."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int, Int8
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One line of a JSON-lines file: a conversation, with images, or plain text."""

    index: int
    origin: str
    """`file:line`, for messages to the user."""
    kind: str
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    images: tuple[Path, ...] = ()
    pixels: int = 0
    """Number of pixels of all its images together."""


@dataclass(frozen=True)
class Example:
    """A tokenized sample. `labels` are -100 but where an answer (or, in plain text, anything) is predicted."""

    index: int
    kind: str
    input_ids: Int[Tensor, " L"]
    labels: Int[Tensor, " L"]
    modality: Int8[Tensor, " L"]
    vision: Mapping[str, Tensor]
    """What the vision tower takes (pixel values, grids); empty for plain text."""
