"""What a finished checkpoint says of itself in qe_manifest.json: how it was made, what it costs, and its hashes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from qe_dist.core.errors import CheckpointError
from qe_dist.core.quantized import FitReport
from qe_dist.core.version import FIRST, VERSION


@dataclass(frozen=True)
class TuningReport:
    """How the tuning of a block went. Its loss is the squared error of the block's output, each token's relative to its
    squared output in full precision, on sequences that nothing is fitted to."""

    steps: int
    """Number of steps made."""
    step: int
    """After which the held-out loss was least; 0: before the first."""
    loss: float
    """Held-out loss of what was kept, over that of the closed form."""
    error: float | None
    """Root of that loss. None where it is not finite."""
    nonfinite: tuple[int, ...]
    """Steps whose loss was NaN or Inf; after each, training went on from the best state at half the rate."""
    kept: Literal["tuned", "closed form"]
    """What the block holds: the closed form where no step lowered the held-out loss."""

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "TuningReport":
        """Reads what `asdict` wrote, as JSON has it."""
        return cls(**{**said, "nonfinite": tuple(said["nonfinite"])})


@dataclass(frozen=True)
class FittedBlock:
    """A block of the model, and how it was made."""

    index: int
    prefix: str
    """Begins the names of its tensors on disk; ends with the dot."""
    groups: Mapping[str, FitReport]
    recipe_from: int
    """The first block of those that have this block's recipe."""
    device: str
    """The device that it was fitted on, with so many threads."""
    threads: int
    tuning: TuningReport | None = None
    """None for a block that was not tuned."""

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "FittedBlock":
        """said: a block of a manifest, or a block's report with its prefix; what else that has is left out."""
        groups = {name: FitReport.from_json(group) for name, group in said["groups"].items()}
        tuning = TuningReport.from_json(said["tuning"]) if "tuning" in said else None
        known = {**said, "groups": groups, "tuning": tuning}
        return cls(**{one.name: known[one.name] for one in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """Writes a block of the manifest."""
        said = vars(self) | {"groups": {name: group.to_json() for name, group in self.groups.items()}}
        tuning = {} if self.tuning is None else {"tuning": asdict(self.tuning)}
        return {name: value for name, value in said.items() if name != "tuning"} | tuning


@dataclass(frozen=True)
class Manifest:
    """The content of qe_manifest.json."""

    recipe: Mapping[str, Any]
    run: Mapping[str, Any]
    """The identity of the run."""
    quantization_config: str
    """SHA-256 of what config.json says of the blocks."""
    files: Mapping[str, str]
    """SHA-256 of every file of tensors."""
    tensors: Mapping[str, Mapping[str, str]]
    """SHA-256 of every tensor, by file."""
    padding: Sequence[int] | None
    """The inner width of the MLPs, as it was and as it is; None where they are not padded."""
    arithmetic: str
    """What the products of all blocks execute: `int8` or `a16`; `a16 and int8` where blocks differ."""
    bits_per_weight: float
    active_bits_per_weight: float
    """Those of them that one token needs."""
    macs_per_weight: float
    macs_by_arithmetic: Mapping[str, float]
    parameters: int
    """Parameters of the whole model."""
    fallbacks: Mapping[str, Sequence[str]]
    """Steps of the ladder, by full name of the group."""
    blocks: tuple[FittedBlock, ...]
    checkpoint_bytes: int
    """Bytes of all files, this one too."""
    left_out: Sequence[str] = ()
    """Calibration samples that were not used, each with the reason."""
    written_by: str = VERSION
    """The version of qe_dist."""

    @classmethod
    def from_json(cls, said: Any) -> "Manifest":
        """CheckpointError where something is missing or not of its kind."""
        try:
            known = {"padding": None, "left_out": (), "written_by": FIRST} | said
            blocks = tuple(FittedBlock.from_json(block) for block in known["blocks"])
            return cls(**{one.name: known[one.name] for one in fields(cls)} | {"blocks": blocks})
        except (AttributeError, KeyError, TypeError) as error:
            writer = said.get("written_by", FIRST) if isinstance(said, Mapping) else FIRST
            other = "" if writer == VERSION else f", or qe_dist {writer} wrote it"
            raise CheckpointError(
                f"it is damaged{other} ({type(error).__name__}: {error}); copy it again, or quantize the model again"
            ) from None

    def to_json(self) -> dict[str, Any]:
        """Writes what `from_json` reads; `padding` only where there is some."""
        said = vars(self) | {"blocks": [block.to_json() for block in self.blocks]}
        return {name: value for name, value in said.items() if name not in ("padding", "left_out") or value}
