"""Methods are found by looking into the folders: the file name is the name, `METHOD` is the class."""

import importlib
import pkgutil
from typing import Any

from qe_dist.core.errors import ConfigError
from qe_dist.core.suggest import suggestion

AXES = {"transform": "transforms", "quantizer": "quantizers", "compensation": "compensation"}
"""What is chosen for every input group."""
FOLDERS = AXES | {"channels": "channels", "rotation": "rotations", "tuning": "tuning"}


def names(axis: str) -> list[str]:
    """Every method of an axis (`transform`, `quantizer`, `compensation`), or of what a recipe may have beside them."""
    folder = importlib.import_module(f"{__name__}.{FOLDERS[axis]}")
    return sorted(m.name for m in pkgutil.iter_modules(folder.__path__))


def get(axis: str, name: str) -> type[Any]:
    """The class of a method. ConfigError, which lists the methods of the axis, where there is none of this name."""
    if name not in names(axis):
        meant = suggestion(name, names(axis))
        raise ConfigError(f"there is no {axis} {name!r}{meant or ';'} there are: {', '.join(names(axis))}")
    method: type[Any] = importlib.import_module(f"{__name__}.{FOLDERS[axis]}.{name}").METHOD
    return method
