"""The settings of a run, its identity, and which runs can share a pass of the calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from qe_dist.core.errors import ConfigError
from qe_dist.data.options import PLAIN, ReadOptions
from qe_dist.io.bucket import is_url
from qe_dist.io.weights import SafetensorsSource
from qe_dist.methods.base import Rotation
from qe_dist.methods.recipe import Recipe
from qe_dist.numerics.sharding import padding_step
from qe_dist.numerics.stats import Needs

Resume = Literal["auto", "required", "never"]
_COUNTS = (
    "workers", "samples_per_batch", "sample_tokens", "threads", "blocks_per_worker", "memory", "host_memory",
    "tensor_parallel_size",
)  # fmt: skip

STATISTICS = 2
"""Version of the statistics and reports; increased when the same samples give other ones, which a run must not mix."""


@dataclass(frozen=True)
class RunConfig:
    """Settings of one run. Raises ConfigError for a value out of range. Paths become absolute, since workers may run in
    other directories."""

    model: Path | str
    """A directory, or a URL that fsspec opens."""
    recipe: Recipe
    calibration: Path | str
    """Where its samples come from, as `data/sources` knows it."""
    output: Path
    workers: int | None = 1
    """Most workers to use; None: as many as the cluster has room for when a wave begins."""
    resume: Resume = "auto"
    device: str = "cpu"
    embed_device: str | None = None
    """Device of embeddings and vision tower; None: `device`. With `cpu`, nodes without a GPU can embed."""
    samples_per_batch: int = 8
    sample_tokens: int = 4096
    """Size of the token sample of every input group."""
    blocks_per_worker: int | None = None
    """Most blocks of a worker in a wave; None: as many as memory allows."""
    memory: int | None = None
    """Bytes that a worker may use on its device; None: most of the free ones."""
    host_memory: int | None = None
    """Bytes of the host that a worker with a GPU may use for Gram matrices; None: most of the free ones."""
    tensor_parallel_size: int = 1
    """Ranks that will serve the checkpoint: the model is padded for them, or the run is refused."""
    mirror: str | None = None
    """URL that gets a copy of every finished file, and from which a lost directory is restored."""
    from_block: int = 0
    """First block of `recipe`. Blocks before it keep the recipe of an earlier call."""
    earlier: tuple[tuple[int, Recipe], ...] = ()
    """First block and recipe of those calls, read from the run directory."""
    threads: int = 1
    """CPU threads of each worker. Their number can change the bits of a result."""
    seed: int = 0
    reading: ReadOptions = PLAIN
    """How the samples are to be read."""

    def __post_init__(self) -> None:
        for name in ("model", "output"):
            if name != "model" or not is_url(self.model):
                object.__setattr__(self, name, _absolute(name, getattr(self, name)))
        _absolute("calibration", self.calibration)  # its names are not all paths, but none may be a loop of links
        for name, device in (("device", self.device), ("embed_device", self.embeds_on)):
            if device not in ("cpu", "cuda"):
                raise ConfigError(f"{name} must be cpu or cuda, found {device!r}")
        if self.mirror is not None and not is_url(self.mirror):
            raise ConfigError(f"mirror must be a URL such as s3://bucket/run or file:///disk, found {self.mirror!r}")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed must lie in 0..2^31-1, found {self.seed}")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        if self.resume not in ("auto", "required", "never"):
            raise ConfigError(f"resume must be auto, required or never, found {self.resume!r}")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the calibration forward: float32 on a CPU, bf16 on a GPU."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def embeds_on(self) -> str:
        """Device of embeddings and vision tower."""
        return self.embed_device or self.device

    def recipe_for(self, block: int) -> Recipe:
        """The recipe of a block."""
        return self._policy(block)[1]

    def start_of(self, block: int) -> int:
        """The first block with the recipe of this block."""
        return self._policy(block)[0]

    def _policy(self, block: int) -> tuple[int, Recipe]:
        return next(p for p in ((self.from_block, self.recipe), *reversed(self.earlier)) if p[0] <= block)

    def identity(self, samples: str) -> Mapping[str, Any]:
        """Everything that must be equal for a run to be continued, as JSON can store it. Places on disk and the number
        and kind of workers may change; a block's report has its kind of worker.

        samples: their fingerprint.
        """
        return {
            "model": SafetensorsSource(self.model).fingerprint(),
            "recipe": self.recipe.describe(),
            "from_block": self.from_block,
            "earlier": [[first, recipe.describe()] for first, recipe in self.earlier],
            "calibration": samples,
            "versions": {
                **{name: version(name) for name in ("torch", "transformers", "scikit-learn")},
                "statistics": STATISTICS,
            },
            "samples_per_batch": self.samples_per_batch,
            "sample_tokens": self.sample_tokens,
            "tensor_parallel_size": self.tensor_parallel_size,
            "seed": self.seed,
        }


def padded_alike(run: RunConfig, recipe: Recipe) -> bool:
    """Whether another recipe pads the model as the run's own does, at the run's tensor-parallel size."""
    step, other = (padding_step(r.scheme, run.tensor_parallel_size) for r in (run.recipe, recipe))
    return step == other


POLICY = ("recipe", "from_block", "earlier")
"""Entries of an identity that `--from-block` may change."""


def needs_of(runs: Sequence[RunConfig], block: int) -> Needs:
    """The statistics of a block that all of these runs need together."""
    needs = Needs()
    for run in runs:
        needs |= run.recipe_for(block).needs()
    return needs


def by_rotation(runs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Groups of runs that can share one pass of the calibration, since they rotate the model alike."""
    groups: dict[Rotation | None, list[RunConfig]] = {}
    for run in runs:
        groups.setdefault(run.recipe.rotation, []).append(run)
    return list(groups.values())


def check_siblings(runs: Sequence[RunConfig]) -> None:
    """Raises ConfigError for runs that cannot share a pass of the calibration, or that would share an output."""
    first = runs[0]
    for run in runs[1:]:
        same = replace(run, recipe=first.recipe, output=first.output, mirror=first.mirror, earlier=first.earlier)
        if same != first:
            raise ConfigError(f"{run.output} and {first.output} differ in more than their recipe")
        if run.recipe.rotation != first.recipe.rotation:
            raise ConfigError(f"{run.output} and {first.output} rotate the model differently: they need a pass each")
        if not padded_alike(run, first.recipe):
            raise ConfigError(f"{run.output} and {first.output} pad the model differently: they need a pass each")
    if len({run.output for run in runs}) < len(runs):
        raise ConfigError("every recipe needs an output directory of its own")
    mirrors = [run.mirror for run in runs if run.mirror is not None]
    if len(set(mirrors)) < len(mirrors):
        raise ConfigError("every recipe needs a mirror of its own")


def _absolute(name: str, path: Path | str) -> Path:
    try:
        return Path(path).resolve()
    except (RuntimeError, OSError) as error:  # a RuntimeError tells a loop of links before Python 3.13
        raise ConfigError(f"{name} {path} is no place on disk: {error}") from None
