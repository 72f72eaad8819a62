"""What every loader of our checkpoints checks first."""

from qe_dist.core.errors import CheckpointError

METHOD = "qe"
VERSION = 2


def check_version(found: int | None) -> None:
    """CheckpointError where the checkpoint was written in another format."""
    if found != VERSION:
        raise CheckpointError(f"this checkpoint has format version {found}, this qe_dist reads {VERSION}")
