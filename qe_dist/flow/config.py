"""What a run is asked to do."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from qe_dist.core.errors import ConfigError
from qe_dist.io.bucket import is_url
from qe_dist.io.weights import SafetensorsSource
from qe_dist.methods.recipe import Recipe
from qe_dist.numerics.stats import Needs

Resume = Literal["auto", "required", "never"]


@dataclass(frozen=True)
class RunConfig:
    model: Path | str
    """A directory, or a URL that fsspec opens."""
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
        for name in ("model", "calibration", "output"):  # workers may run in other directories
            if name != "model" or not is_url(self.model):
                object.__setattr__(self, name, Path(getattr(self, name)).resolve())
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, found {self.device!r}")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed must lie in 0..2^31-1, found {self.seed}")
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

    def identity(self, images: Iterable[Path]) -> Mapping[str, Any]:
        """What must be equal for a run to be continued; the number of workers and places on disk are not part of it.

        images: those that the calibration file names.
        """
        return {
            "model": SafetensorsSource(self.model).fingerprint(),
            "recipe": self.recipe.describe(),
            "calibration": _hash(self.calibration.read_bytes()),
            "images": _hash(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in images)),
            "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn")},
            "samples_per_batch": self.samples_per_batch,
            "sample_tokens": self.sample_tokens,
            "device": self.device,
            "threads": self.threads,
            "seed": self.seed,
        }


def needs_of(runs: Sequence[RunConfig]) -> Needs:
    """The statistics that serve all of these runs."""
    needs = Needs()
    for run in runs:
        needs |= run.recipe.needs()
    return needs


def check_siblings(runs: Sequence[RunConfig]) -> None:
    """Runs that share one pass of the calibration may differ in recipe and output only."""
    first = runs[0]
    for run in runs[1:]:
        if replace(run, recipe=first.recipe, output=first.output) != first:
            raise ConfigError(f"{run.output} and {first.output} differ in more than their recipe")
        if run.recipe.rotation != first.recipe.rotation:
            raise ConfigError(f"{run.output} and {first.output} rotate the model differently: they need a pass each")
    if len({run.output for run in runs}) < len(runs):
        raise ConfigError("every recipe needs an output directory of its own")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
