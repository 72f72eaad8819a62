"""Opens a model as every command does: files found and whole, quantized ones refused or dequantized, and all names,
shapes and settings compared with the architecture. What passes here, quantize, eval, verify, transformers and vLLM
load. Nothing but headers is read, and nothing is written.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qe_dist import archs
from qe_dist.archs.base import HEAD, Family
from qe_dist.archs.shared.settings import check_settings, fields_of
from qe_dist.archs.shared.tensors import Fit, block_numbers, common_prefix, fit, name_on_disk
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.io.dequantized import DequantizedSource, dequantized
from qe_dist.io.shards import DTYPES, FLOATS
from qe_dist.io.weights import SafetensorsSource

Files = SafetensorsSource | DequantizedSource


@dataclass(frozen=True)
class Model:
    """A model in full precision that can be quantized, measured and compared."""

    arch: Family
    source: "ModelSource"
    notes: tuple[str, ...]
    """What was left out, taken along or changed, a line each."""


def open_model(place: Path | str) -> Model:
    """place: a directory, or a URL. Raises ConfigError or CheckpointError, which name file, tensor or field, for what
    could not be loaded."""
    files = dequantized(SafetensorsSource(place))
    arch = archs.for_config(files.config)
    check_settings(arch, files.config, files.shown("config.json"))
    shapes = {name: files.shape(name) for name in files.names()}
    try:
        found = fit(arch, files.config, shapes)
    except ConfigError as error:
        raise ConfigError(f"{files.shown('')}: {error}") from error.__cause__
    _refuse(arch, files, found)
    left_out = {*found.surplus, *_positions(files)}
    notes = [*files.notes, *_left_out(files, sorted(left_out), arch)]
    if found.carried:
        notes.append(f"{_some(found.carried)} go along unread, as transformers does; engines may use them")
    config, changed = _settings(files, found, left_out)
    notes += changed
    embeddings = name_on_disk(arch, f"model.{arch.frontend.decoder}embed_tokens.weight", files.names())
    only_head = found.tied and embeddings not in files.names()
    kept = [name for name in files.names() if name not in left_out and not (only_head and name == HEAD)]
    for name in kept:
        if (dtype := files.dtype(name)) not in FLOATS.values():
            stored = next(known for known, one in DTYPES.items() if one == dtype)
            raise CheckpointError(
                f"{files.shown('')}: {name} has dtype {stored}, expected one of {', '.join(FLOATS)}; only "
                "full-precision models can be quantized"
            )
    source = ModelSource(files, config, {name: name for name in kept} | ({embeddings: HEAD} if only_head else {}))
    _check_names(arch, source)
    return Model(arch, source, tuple(notes))


class ModelSource:
    """The tensors of a model and no others.

    stored: their names -> those in the files, which differ where tied embeddings were saved as the head alone.
    """

    def __init__(self, files: Files, config: Mapping[str, Any], stored: Mapping[str, str]) -> None:
        self.files, self.config, self.folder = files, config, files.folder
        self._stored = dict(stored)

    def names(self) -> Collection[str]:
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files.shape(self._stored.get(name, name))

    def get(self, name: str) -> Tensor:
        return self.files.get(self._stored.get(name, name))

    def prefetch(self, names: Iterable[str]) -> None:
        self.files.prefetch([self._stored.get(name, name) for name in names])


def _refuse(arch: Family, files: Files, found: Fit) -> None:
    """Raises CheckpointError for tensors that are missing or of another shape, naming what is most likely wrong."""
    place = files.shown("")
    if found.wrong:
        name, (own, wanted) = next(iter(found.wrong.items()))
        fields = fields_of(arch, files.config, own, wanted)
        raise CheckpointError(
            f"{place}: {name} has shape {own}, config.json asks for {wanted}{fields}; config.json and the tensors "
            f"({len(found.wrong)} differ) are not of one model"
        )
    if not found.missing:
        return
    if (prefix := common_prefix(found.surplus, found.missing)) is not None:
        raise CheckpointError(
            f"{place} has no tensor {found.missing[0]} (and {len(found.missing) - 1} more), but all its names begin "
            f"with {prefix!r}, as wrappers of training and adapter libraries leave it; save the model that is inside"
        )
    first, blocks = found.missing[0], block_numbers(arch, found.missing)
    if HEAD in found.missing:
        raise CheckpointError(
            f"{place} has no {HEAD}, which its config.json asks for (tie_word_embeddings is false): set "
            "tie_word_embeddings to true if the head is the embeddings, else copy the missing tensor"
        )
    count = arch.text(files.config).num_hidden_layers
    there = block_numbers(arch, files.names())
    if blocks and there and min(blocks) > max(there):
        raise CheckpointError(
            f"{files.shown('config.json')}: num_hidden_layers is {count}, but the files have blocks "
            f"{min(there)} to {max(there)}; correct the number, or copy the missing shards"
        )
    raise CheckpointError(
        f"{place} has no tensor {first} (and {len(found.missing) - 1} more), which the architecture needs; copy its "
        "shards again, or correct config.json"
    )


def _positions(files: Files) -> Iterator[str]:
    """Buffers of integers that older versions of transformers saved."""
    for name in files.names():
        if name.rpartition(".")[2] == "position_ids" and not files.dtype(name).is_floating_point:
            yield name


def _left_out(files: Files, surplus: Collection[str], arch: Family) -> Iterator[str]:
    """A line for what is left out: whole blocks are told as such."""
    count = arch.text(files.config).num_hidden_layers
    behind = [name for name in surplus if (found := block_numbers(arch, [name])) and min(found) >= count]
    if behind:
        blocks = block_numbers(arch, behind)
        yield (
            f"blocks {min(blocks)} to {max(blocks)} of {files.shown('')} are left out: its config.json says "
            f"num_hidden_layers {count}"
        )
    others = [name for name in surplus if name not in behind]
    if others:
        yield f"{_some(others)} of {files.shown('')} is left out: {arch.name} has no such tensor"


def _some(names: Collection[str]) -> str:
    first = next(iter(names))
    return first if len(names) == 1 else f"{first} (and {len(names) - 1} more)"


def _settings(files: Files, found: Fit, left_out: set[str]) -> tuple[Mapping[str, Any], list[str]]:
    """config.json as the checkpoint gets it, and a line for each change: engines need a class, and one answer to the
    question of whether the head is the embeddings. A head beside tied embeddings is left out where it is equal to them;
    where it is not, transformers would keep both and vLLM the embeddings, so the checkpoint says that they are not
    tied."""
    config, shown, notes = copy.deepcopy(dict(files.config)), files.shown("config.json"), []
    if not config.get("architectures"):
        config["architectures"] = [found.class_name]
        notes.append(f"{shown} names no architectures; the checkpoint's names {found.class_name}, which engines need")
    tied = found.tied
    embeddings = next((n for n in files.names() if n.endswith("embed_tokens.weight")), None)
    if tied and HEAD in files.names() and embeddings is not None:
        if files.same(HEAD, embeddings):
            left_out.add(HEAD)
        else:
            tied = config["tie_word_embeddings"] = False
            notes.append(
                f"{shown}: tie_word_embeddings is true, but {HEAD} is not {embeddings}; it is kept, as transformers "
                "does, and the checkpoint says false"
            )
    inner = config["text_config"] if isinstance(config.get("text_config"), dict) else {}
    for place in (config, inner):
        if place.get("tie_word_embeddings", tied) != tied:
            place["tie_word_embeddings"] = tied
            if tied == found.tied:
                notes.append(
                    f"{shown}: tie_word_embeddings differs between top and text_config; it is {str(tied).lower()}, as "
                    "transformers takes it, and the checkpoint says so in both"
                )
    return config, notes


def _check_names(arch: Family, source: ModelSource) -> None:
    """Raises CheckpointError for a layout of names that transformers still loads and we do not find blocks in."""
    spec = arch.spec(source)
    wanted = [block.prefix + name for block in spec.blocks for name in block.others]
    absent = [name for name in wanted if name not in source.names()]
    if absent:
        raise CheckpointError(
            f"{source.files.shown('')} has no tensor {absent[0]}; its names are of another version of transformers: "
            "load it there and save it again by save_pretrained"
        )
