"""The interface through which architectures read a model on disk."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class WeightSource(Protocol):
    folder: Path
    config: Mapping[str, Any]

    def names(self) -> Collection[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def get(self, name: str) -> Tensor:
        """One tensor, read when asked for. CheckpointError names file and tensor."""
        ...

    def prefetch(self, names: Iterable[str]) -> None:
        """Begins to read ahead what will soon be asked for, and returns at once. A hint: nothing fails here."""
        ...
