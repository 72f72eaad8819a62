"""How samples are to be read, whatever they come from."""

from dataclasses import dataclass
from pathlib import Path

from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import UNBOUNDED, PixelBounds


@dataclass(frozen=True)
class ReadOptions:
    columns: tuple[tuple[str, str], ...] = ()
    """Pairs of a name that we know (`question`) and what the data calls it (`query`)."""
    limit: int | None = None
    """Samples that are read; None: all."""
    image_root: Path | None = None
    """Folder of images that are named by a relative path; None: that of the file that names them."""
    allow_remote: bool = False
    """Whether images at http and https addresses are fetched."""
    skip_bad: float = 0.0
    """Share of the samples that may be left out because something is wrong with them."""
    bounds: PixelBounds = UNBOUNDED
    """Bounds of every image that its sample sets none for."""
    seed: int = 0
    """Seed of the order in which the parts of a mixture take turns."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"the number of samples must be at least 1, found {self.limit}")
        if not 0 <= self.skip_bad < 1:
            raise ConfigError(f"the share of bad samples must be 0 % or more and below 100 %, found {self.skip_bad:%}")
        check_bounds(self.bounds, "options")


def check_bounds(bounds: PixelBounds, where: str) -> None:
    """ConfigError where no image could keep to them."""
    least, most = bounds.least, bounds.most
    if (least is not None and least < 1) or (most is not None and most < 1):
        raise ConfigError(f"{where}: min_pixels and max_pixels must be at least 1, found {least} and {most}")
    if least is not None and most is not None and least > most:
        raise ConfigError(f"{where}: min_pixels {least} is more than max_pixels {most}")


PLAIN = ReadOptions()
