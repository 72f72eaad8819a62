"""What every loader of our checkpoints checks first: that its files are as written."""

import logging
from pathlib import Path

from qe_dist.core.errors import CheckpointError
from qe_dist.io.checkpoint import MANIFEST, read_manifest
from qe_dist.io.integrity import file_faults, settings_faults
from qe_dist.io.publish import read_json

logger = logging.getLogger(__name__)


def check_files(folder: Path) -> None:
    """CheckpointError where the files are not those that were written: a flipped bit fits in type and shape.

    Reads every file once. A warning where there is nothing to compare: no manifest, or weights that an engine streams
    from elsewhere.
    """
    if not (folder / MANIFEST).exists() or not any(folder.glob("*.safetensors")):
        logger.warning("%s lacks %s or weights: no one knows whether they are as written", folder, MANIFEST)
        return
    manifest = read_manifest(folder)
    faults = settings_faults(read_json(folder / "config.json"), manifest) + file_faults(folder, manifest)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckpointError(f"{folder} is damaged: {faults[0]}{more}; copy it again, or see qe-dist verify")
