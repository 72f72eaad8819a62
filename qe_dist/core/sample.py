"""Calibration and evaluation data before and after tokenization."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int, Int8
from torch import Tensor


@dataclass(frozen=True)
class PixelBounds:
    """Fewest and most pixels that an image is to be scaled to. None: what the model's image processor takes."""

    least: int | None = None
    most: int | None = None


UNBOUNDED = PixelBounds()


@dataclass(frozen=True)
class ImageRef:
    """Where the encoded bytes of an image are: in a file, in this process's scratch file, or here."""

    name: str
    """What messages to the user call it."""
    path: Path | None = None
    begin: int = 0
    """Where its bytes begin in the scratch file, which has the images that are no files."""
    length: int = 0
    content: bytes | None = None
    """The bytes themselves, in a sample that goes to another process."""
    bounds: PixelBounds = UNBOUNDED
    size: tuple[int, int] = (0, 0)
    """Width and height of the decoded image."""


@dataclass(frozen=True)
class Sample:
    """A conversation, with images, or plain text."""

    index: int
    origin: str
    """`file:line`, for messages to the user."""
    kind: str
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    images: tuple[ImageRef, ...] = ()
    digest: str = ""
    """SHA-256 of what is said and of all pixels, whatever form of file they came in."""


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
    cut: int = 0
    """Tokens at its end that the model's context has no room for."""
