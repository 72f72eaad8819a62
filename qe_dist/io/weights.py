"""Tensors of a model directory, by name, one at a time: no process ever holds the model."""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.source import WeightSource

_DTYPES = ("BF16", "F16", "F32")


class SafetensorsSource:
    """A Hugging Face model directory. Opening it reads headers only; `get` holds one tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config = _read_json(self.folder / "config.json")
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            weight_map: dict[str, str] = _read_json(index).get("weight_map", {})
            files = sorted(set(weight_map.values()))
        else:
            weight_map, files = {}, ["model.safetensors"]
        self._file_of: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        for file in files:
            self._read_header(file)
        missing = sorted(set(weight_map) - set(self._file_of))
        if missing:
            raise CheckpointError(
                f"{index} places {missing[0]} (and {len(missing) - 1} more) in {weight_map[missing[0]]}, "
                "which does not hold it; copy the shard again"
            )

    def _read_header(self, file: str) -> None:
        path = self.folder / file
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing; a model directory needs every safetensors shard that its index names"
            )
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    part = shard.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise CheckpointError(
                            f"{path}: {name} has dtype {part.get_dtype()}, expected one of {_DTYPES}; "
                            "only full-precision models can be quantized"
                        )
                    self._file_of[name] = file
                    self._shape[name] = tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read as safetensors ({error}); it may be truncated, copy it again"
            ) from None

    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shape:
            raise CheckpointError(f"{self.folder} has no tensor {name}, which the architecture needs")
        return self._shape[name]

    def get(self, name: str) -> Tensor:
        self.shape(name)
        path = self.folder / self._file_of[name]
        with safe_open(path, framework="pt") as shard:
            tensor = shard.get_tensor(name)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} contains NaN or Inf")
        return tensor


def upper_bytes(source: WeightSource, names: Collection[str]) -> int:
    """Upper bound of what these tensors take, without reading them."""
    return sum(4 * math.prod(source.shape(name)) for name in names)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(f"{path} does not exist; expected a Hugging Face model directory")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
