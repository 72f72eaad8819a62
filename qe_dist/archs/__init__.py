"""Architectures are found by looking into this folder: each file beside base.py is one, for its `model_type`s."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from qe_dist.archs.base import Family
from qe_dist.core.errors import ConfigError
from qe_dist.core.suggest import suggestion

GUIDE = "docs/how/adding-a-model.md"


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and m.name != "base")


def get(name: str) -> Family:
    family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return family


def for_config(config: Mapping[str, Any]) -> Family:
    """The architecture of the `config.json` of a model that is to be quantized. ConfigError where there is none for it,
    or where the model is one of code that is not run."""
    arch = for_checkpoint(config)
    if config.get("quantization_config") is not None:
        raise ConfigError("this model is quantized already; give the full-precision model")
    if isinstance(config.get("auto_map"), Mapping) and config["auto_map"]:
        raise ConfigError(
            f"config.json names code of its own ({', '.join(map(str, config['auto_map']))} in auto_map), which is not "
            f"run: it may compute something else than transformers' own {arch.name}. If it does not, take auto_map out"
        )
    return arch


def for_engine(model_type: str) -> Family:
    """The architecture of a `model_type` as engines name it, which may be that of the model that drafts tokens.
    ConfigError where there is none for it."""
    drafted = next((name for name in names() if get(name).in_vllm.draft == model_type), None)
    return get(drafted) if drafted else for_checkpoint({"model_type": model_type})


def for_checkpoint(config: Mapping[str, Any]) -> Family:
    """The architecture of a Hugging Face `config.json`, quantized or not."""
    known = {t: name for name in names() for t in get(name).model_types}
    found = config.get("model_type")
    if not isinstance(found, str) or found not in known:
        own = " and needs code of its own (auto_map), which is not run" if config.get("auto_map") else ""
        meant = suggestion(found, known) if isinstance(found, str) else ""
        raise ConfigError(
            f"config.json has model_type {str(found)[:40]!r}{own}{meant}; supported are: {', '.join(sorted(known))}. "
            f"How to add one: {GUIDE}"
        )
    return get(known[found])
