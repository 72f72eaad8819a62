"""What a run is asked to do."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qe_dist.core.errors import ConfigError
from qe_dist.methods.base import Recipe

Resume = Literal["auto", "required", "never"]


@dataclass(frozen=True)
class RunConfig:
    model: Path
    recipe: Recipe
    calibration: Path
    output: Path
    workers: int = 1
    resume: Resume = "auto"
    device: str = "cpu"
    samples_per_batch: int = 8
    sample_tokens: int = 4096
    """Size of the token sample of every input group."""
    blocks_per_worker: int | None = None
    """None: as many as needed for one wave, if memory allows."""
    threads: int = 1
    """Of each worker; part of what makes a result repeatable to the bit."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("workers", "samples_per_batch", "sample_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.blocks_per_worker is not None and self.blocks_per_worker < 1:
            raise ConfigError(f"blocks_per_worker must be at least 1, found {self.blocks_per_worker}")
        if self.resume not in ("auto", "required", "never"):
            raise ConfigError(f"resume must be auto, required or never, found {self.resume!r}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the calibration forward: full precision on CPU, the model's own bf16 on a GPU."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def identity(self) -> Mapping[str, Any]:
        """What must be equal for a run to be continued; the number of workers is not part of it."""
        return {
            "model": {"path": str(self.model.resolve()), "weights": _fingerprint(self.model)},
            "recipe": self.recipe.describe(),
            "calibration": _hash(self.calibration.read_bytes()),
            "samples_per_batch": self.samples_per_batch,
            "sample_tokens": self.sample_tokens,
            "device": self.device.split(":")[0],
            "threads": self.threads,
            "seed": self.seed,
        }


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _fingerprint(model: Path) -> str:
    """Of config and shard names, sizes and headers: cheap for any size, and a changed model shows."""
    parts = [(model / "config.json").read_bytes()]
    for shard in sorted(model.glob("*.safetensors")):
        with shard.open("rb") as file:
            head = file.read(8)
            header = file.read(min(int.from_bytes(head, "little"), 64 << 20))
        parts.append(f"{shard.name} {shard.stat().st_size}".encode() + header)
    return _hash(b"\n".join(parts))
