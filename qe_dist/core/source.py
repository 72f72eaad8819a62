"""The interface through which architectures read a model on disk."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class WeightSource(Protocol):
    """A model directory, on disk or behind a URL, or one that is made from another when a tensor is asked for."""

    @property
    def folder(self) -> Path:
        """Where the files beside the weights are (tokenizer, processor)."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json."""
        ...

    def names(self) -> Collection[str]:
        """The names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its header. CheckpointError where there is none of this name."""
        ...

    def get(self, name: str) -> Tensor:
        """One tensor, read when asked for. CheckpointError names file and tensor."""
        ...

    def prefetch(self, names: Iterable[str]) -> None:
        """Begins to read ahead what will soon be asked for, and returns at once. A hint: nothing fails here."""
        ...
