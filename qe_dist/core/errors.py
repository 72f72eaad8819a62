"""Errors for the user. Each takes one string, so that it survives the trip out of a Ray worker."""


class QEError(Exception):
    """Anything that the user can act on. The command line prints it as one paragraph and exits with 2."""


class ConfigError(QEError, ValueError):
    """An option, recipe, calibration file or output directory that cannot be used as it is."""


class CheckpointError(QEError):
    """A model or checkpoint on disk that is missing, damaged or not of the expected form."""


class Stopped(QEError):
    """The user asked to stop. Nothing is wrong; the same command continues."""


class NumericalError(QEError):
    """A computation that failed numerically. `methods/recipe.py` catches it and takes the next step of LADDER."""
