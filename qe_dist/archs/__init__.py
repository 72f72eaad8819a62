"""Architectures are found by looking into this folder: each file beside base.py is one, for its `model_type`s."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from qe_dist.archs.base import Family
from qe_dist.core.errors import ConfigError

GUIDE = "docs/how/adding-a-model.md"


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and m.name != "base")


def get(name: str) -> Family:
    return importlib.import_module(f"{__name__}.{name}").FAMILY


def for_config(config: Mapping[str, Any]) -> Family:
    """The architecture of the `config.json` of a model that is to be quantized. ConfigError where there is none for it,
    or where the model is one of code that is not run."""
    arch = for_checkpoint(config)
    if "quantization_config" in config:
        raise ConfigError("this model is quantized already; give the full-precision model")
    if "auto_map" in config:
        raise ConfigError(
            f"config.json names code of its own ({', '.join(sorted(config['auto_map']))} in auto_map), which is not "
            f"run: it may compute something else than transformers' own {arch.name}. If it does not, take auto_map out"
        )
    return arch


def for_checkpoint(config: Mapping[str, Any]) -> Family:
    """The architecture of a Hugging Face `config.json`, quantized or not."""
    known = {t: name for name in names() for t in get(name).model_types}
    found = config.get("model_type")
    if found not in known:
        own = " and needs code of its own (auto_map), which is not run" if "auto_map" in config else ""
        raise ConfigError(
            f"config.json has model_type {found!r}{own}; supported are: {', '.join(sorted(known))}. "
            f"How to add one: {GUIDE}"
        )
    return get(known[found])
