"""Errors for the user. Each takes one string, so that it survives the trip out of a Ray worker."""

import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk or a quota that is full."""


class QEError(Exception):
    """Anything that the user can act on. The command line prints it as one paragraph and exits with 2."""


class TemporaryError(QEError):
    """A node, a worker or room on a disk was lost, which is no fault of the input. What is finished is kept, and the
    same command continues. The command line exits with 75 (EX_TEMPFAIL)."""


class ConfigError(QEError, ValueError):
    """An option, recipe, calibration file or output directory that cannot be used as it is."""


class CheckpointError(QEError):
    """A model or checkpoint on disk that is missing, damaged or not of the expected form."""


class NoRoomError(ConfigError, TemporaryError):
    """A disk or a cluster that has too little room now for what is asked. The same command works once there is more."""


class TemporaryFileError(CheckpointError, TemporaryError):
    """A file for which a disk has no room, or that was damaged and is removed. The same command makes it."""


class Stopped(TemporaryError):
    """The user asked to stop. Nothing is wrong; the same command continues."""


class CheckFailed(QEError):
    """A check that the user asked for found faults. The command line exits with 1."""


class NumericalError(QEError):
    """A computation that failed numerically. `methods/recipe.py` catches it and takes the next step of LADDER."""
