"""Which tensors a model is made of, asked of transformers: its own loader is given empty tensors of the names and
shapes that the files have. So old and new names, tied heads, stacked experts, and what a model leaves unread are as
they will be when the finished checkpoint is loaded. No tensor is read and none is allocated; a 72B takes half a second.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qe_dist.archs.base import HEAD, Family
from qe_dist.archs.shared.settings import shortened
from qe_dist.core.errors import ConfigError

NEVER_READ = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|masked_bias)$")
"""Buffers that older versions of transformers saved and that are computed today."""


@dataclass(frozen=True)
class Fit:
    """How the tensors of some files fit a model."""

    missing: tuple[str, ...]
    """Tensors of the model that no file has, named as the files name others."""
    wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Names in the files -> their shape, and that which the model wants."""
    surplus: tuple[str, ...]
    """Names in the files that the model does not know."""
    carried: tuple[str, ...]
    """Names in the files that transformers leaves unread on purpose, such as `mtp.*`: engines read them."""
    tied: bool
    """Whether the head is the embeddings, as config.json says it."""
    class_name: str
    """The class of transformers, which `architectures` of a config.json names."""


def fit(arch: Family, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Fit:
    """Compares names and shapes of files with the model that a `config.json` describes.

    Raises ConfigError where transformers cannot make a model of that configuration.
    """
    dead = {name for name in shapes if NEVER_READ.search(name)}
    model, found = _load(arch, config, {n: shape for n, shape in shapes.items() if n not in dead})
    surplus = {_in_files(name, shapes) for name in found["unexpected_keys"]} | dead
    mismatched = sorted(found["mismatched_keys"], key=lambda one: _in_order(one[0]))
    wrong = {_in_files(n, shapes): (tuple(own), tuple(wanted)) for n, own, wanted in mismatched}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    known = {*model.state_dict()}
    carried = {n for n in shapes if n not in known | surplus and any(p.search(n) for p in ignored)}
    return Fit(
        tuple(sorted((name_on_disk(arch, n, shapes) for n in found["missing_keys"]), key=_in_order)),
        wrong,
        tuple(sorted(surplus, key=_in_order)),
        tuple(sorted(carried, key=_in_order)),
        HEAD in model.all_tied_weights_keys,
        type(model).__name__,
    )


def _load(arch: Family, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, Any]:
    """An empty model, and what the loader of transformers says of the files."""
    with _quiet():
        try:
            settings = arch.hf_config(config)
            own = arch.auto_class()._model_mapping[type(settings)]
            empty = {n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, s in shapes.items()}
            found: tuple[Any, Any] = own.from_pretrained(
                None,
                config=settings,
                state_dict=empty,
                device_map="meta",
                dtype=torch.bfloat16,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # of any kind: transformers checks a configuration in many places
            raise ConfigError(
                f"config.json describes no {arch.name} that transformers can make: {shortened(error)}"
            ) from error
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses transformers' own report of what is missing, and its bar."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _in_files(name: str, names: Collection[str]) -> str:
    """The name in the files of a tensor that the loader names as the model would: the one with the longest common
    ending, since only beginnings are renamed."""
    if name in names:
        return name
    return max(names, key=lambda other: (_common_ending(name, other), other))


def name_on_disk(arch: Family, name: str, names: Collection[str]) -> str:
    """What the files would call a tensor of the model: with that beginning of the family's which others have here."""
    inner = name.removeprefix("model.")
    prefix = next((p for p in arch.on_disk if inner.startswith(p)), None)
    if name == HEAD or prefix is None:
        return name
    used = [p for p in arch.on_disk[prefix] if any(other.startswith(p) for other in names)]
    return f"{max(used, key=len, default=arch.on_disk[prefix][-1])}{inner.removeprefix(prefix)}"


def common_prefix(surplus: Collection[str], missing: Collection[str]) -> str | None:
    """What stands in front of all names that the model does not know, where without it they would be those that it
    misses: training and adapter libraries leave such prefixes. None where nothing does."""
    first = min(surplus, key=len, default="")
    for end in (i + 1 for i, letter in enumerate(first) if letter == "."):
        prefix = first[:end]
        if all(name.startswith(prefix) for name in surplus):
            bare = {name.removeprefix(prefix) for name in surplus}
            if sum(any(known.endswith(name) for known in missing) for name in sorted(bare)[:8]) >= min(8, len(bare)):
                return prefix
    return None


def block_numbers(arch: Family, names: Collection[str]) -> set[int]:
    """The numbers of the blocks that these tensors are of, as files name them."""
    decoder = arch.frontend.decoder
    prefix = next(p for p in arch.on_disk if decoder.startswith(p) or p == decoder)
    block = re.compile(rf"({'|'.join(map(re.escape, arch.on_disk[prefix]))})layers\.(\d+)\.")
    return {int(match[2]) for name in names if (match := block.match(name))}


def _common_ending(one: str, other: str) -> int:
    count = 0
    for a, b in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count


def _in_order(name: str) -> tuple[Any, ...]:
    """Sorts block 10 behind block 9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))
