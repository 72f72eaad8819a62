"""Whether a checkpoint is what was written, whole, finite, and sees its images.

Every check returns the faults that it found, each one line that begins with the file or tensor. The checks of files
hold a few MiB at a time, whatever the size of the model.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from qe_dist import archs
from qe_dist.archs.base import Encoder, Family
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.layout import BlockLayout, Layout, TensorSpec
from qe_dist.core.manifest import FittedBlock, Manifest
from qe_dist.core.sample import ImageRef, Sample
from qe_dist.core.source import WeightSource
from qe_dist.io.checkpoint import INDEX, MANIFEST, read_manifest
from qe_dist.io.integrity import file_faults, settings_faults
from qe_dist.io.padded import PaddedSource
from qe_dist.io.publish import DTYPES, read_json
from qe_dist.io.rotated import RotatedSource
from qe_dist.model import open_model

SLICE_BYTES = 2**26
"""Bytes of a tensor that are looked at, at a time."""


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint by its descriptions alone."""

    folder: Path
    config: Mapping[str, Any]
    layout: Layout
    """What `config` says of the quantized blocks."""
    manifest: Manifest
    weight_map: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, TensorSpec]]
    """File -> its tensors, as the files themselves say."""
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Reads JSON and headers. ConfigError where there is no checkpoint of ours; CheckpointError where one of these
        files is damaged, or written in another version of the format."""
        for name in ("config.json", MANIFEST, INDEX):
            if not (folder / name).exists():
                raise ConfigError(f"{folder} has no {name}; give a finished checkpoint of qe-dist")
        config, index, manifest = read_json(folder / "config.json"), read_json(folder / INDEX), read_manifest(folder)
        if "weight_map" not in index:
            raise CheckpointError(f"{folder / INDEX} has no weight_map: it is damaged; copy it again")
        layout = Layout.from_json(config.get("quantization_config"))
        tensors, unreadable = {}, {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                tensors[path.name] = _header(path)
            except (SafetensorError, OSError) as error:
                unreadable[path.name] = str(error)
        return cls(folder, config, layout, manifest, index["weight_map"], tensors, unreadable)

    @property
    def blocks(self) -> Iterator[tuple[FittedBlock, BlockLayout]]:
        """Every block as manifest and config.json have it. ValueError where one has more of them."""
        return zip(self.manifest.blocks, self.layout.blocks, strict=True)

    def find(self, name: str) -> TensorSpec | None:
        return next((held[name] for held in self.tensors.values() if name in held), None)


def check_hashes(checkpoint: Checkpoint) -> list[str]:
    """Every file of the manifest is there as it was written, and there are no others; config.json describes them."""
    return settings_faults(checkpoint.config, checkpoint.manifest) + file_faults(checkpoint.folder, checkpoint.manifest)


def check_index(checkpoint: Checkpoint) -> list[str]:
    """Every tensor of the index is in the file that it names and in no other, and no file holds more."""
    faults = [f"{name}: cannot be read: {error}" for name, error in checkpoint.unreadable.items()]
    for name, file in checkpoint.weight_map.items():
        if file not in checkpoint.unreadable and name not in checkpoint.tensors.get(file, ()):
            faults.append(f"{name}: missing in {file}, where the index places it")
    for file, held in checkpoint.tensors.items():
        for name in held:
            if (place := checkpoint.weight_map.get(name)) != file:
                faults.append(f"{name}: in {file}, but the index " + (f"places it in {place}" if place else "has none"))
    return faults


def check_finite(checkpoint: Checkpoint) -> list[str]:
    """No tensor has a NaN or Inf."""
    faults = []
    for file in checkpoint.tensors:
        with suppress(SafetensorError, OSError), safe_open(checkpoint.folder / file, framework="pt") as held:
            for name in held.keys():  # noqa: SIM118 (not a dict)
                if not all(bool(torch.isfinite(part).all()) for part in _slices(held, name)):
                    faults.append(f"{name}: NaN or Inf in {file}")
    return faults


def check_layout(checkpoint: Checkpoint) -> list[str]:
    """Every quantized linear that config.json describes has all its tensors, in type and shape as described."""
    said, listed = len(checkpoint.layout.blocks), len(checkpoint.manifest.blocks)
    if said != listed:
        return [f"config.json: {said} blocks, {MANIFEST} has {listed}"]
    faults = []
    for block, layout in checkpoint.blocks:
        for name, expected in layout.tensors.items():
            faults += _compare(block.prefix + name, expected, checkpoint.find(block.prefix + name))
    return faults


def check_source(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Every linear of the model that was quantized is there once, all else of it as it was, and nothing more."""
    source = _source(folder, checkpoint.manifest)
    spec = archs.for_config(source.config).spec(source)
    layouts = checkpoint.layout.blocks
    if len(layouts) != len(spec.blocks):
        return [f"config.json: {len(layouts)} blocks, {folder} has {len(spec.blocks)}"]
    faults, expected = [], set(spec.passthrough)
    kept = list(spec.passthrough)
    for block, layout in zip(spec.blocks, layouts, strict=True):
        linears = {x.name: x for group in block.groups for x in group.linears}
        described = [name for group in layout.groups.values() for name in group.linears]
        faults += [f"{block.prefix}{n}: not quantized" for n in linears if described.count(n) == 0]
        faults += [
            f"{block.prefix}{n}: quantized {described.count(n)} times" for n in linears if described.count(n) > 1
        ]
        faults += [f"{block.prefix}{n}: not in {folder}" for n in described if n not in linears]
        faults += _wrong_shapes(
            checkpoint, block.prefix, {n: (x.out_features, x.in_features) for n, x in linears.items()}
        )
        kept += [block.prefix + name for name in block.others]
        kept += [f"{block.prefix}{n}.bias" for n, x in linears.items() if x.bias]
        expected |= {block.prefix + name for name in layout.tensors}
    for name in kept:
        found = checkpoint.find(name)
        faults += _compare(name, TensorSpec(found.dtype if found else "any", tuple(source.shape(name))), found)
    return faults + [f"{name}: not of {folder}" for name in sorted({*checkpoint.weight_map} - expected - {*kept})]


def image_effect(model: Any, arch: Family, encoder: Encoder) -> float:
    """How far two different images move the logits of the last position, over their size: 0 for a blind model, NaN for
    one that computes NaN."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    one, other = (_last_logits(model, arch, encoder, Image.fromarray(x)) for x in (noise, 255 - noise))
    return float((one - other).norm() / one.norm())


@torch.no_grad()
def _last_logits(model: Any, arch: Family, encoder: Encoder, image: Image.Image) -> torch.Tensor:
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "It"}]}
    example = encoder(Sample(0, "verify", "image", (asked, answer), images=(ImageRef("random"),)), [image])
    inputs = {k: v.to(model.device) for k, v in arch.model_inputs([example], pad=0).items()}
    return model(**inputs, use_cache=False).logits[0, -1].float()


def _source(folder: Path, manifest: Manifest) -> WeightSource:
    """Names and shapes of the model that was quantized: rotated, it may have a head that was tied; padded, its MLPs are
    wider."""
    model = open_model(folder)
    source: WeightSource = model.source
    arch = model.arch
    if manifest.recipe.get("rotation") is not None:
        source = RotatedSource(source, arch.rotation_sites(source), bases={})
    if manifest.padding is not None:
        width = manifest.padding[1]
        source = PaddedSource(source, arch.spec(source), arch.widened(source.config, width), width)
    return source


def _header(path: Path) -> dict[str, TensorSpec]:
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {n: TensorSpec(_named(p.get_dtype()), tuple(p.get_shape())) for n, p in parts.items()}


def _named(dtype: str) -> str:
    """A type's name in config.json, from its name in safetensors."""
    return str(DTYPES.get(dtype, dtype)).removeprefix("torch.")


def _slices(file: Any, name: str) -> Iterator[torch.Tensor]:
    """A tensor in parts of bounded size, along its first dimension."""
    part = file.get_slice(name)
    shape = part.get_shape()
    if not shape:
        yield file.get_tensor(name)
        return
    row = 8 * int(np.prod(shape[1:]))
    step = max(1, SLICE_BYTES // max(1, row))
    for start in range(0, shape[0], step):
        yield part[start : start + step]


def _compare(name: str, expected: TensorSpec, found: TensorSpec | None) -> list[str]:
    if found is None:
        return [f"{name}: missing"]
    return [] if found == expected else [f"{name}: expected {expected}, found {found}"]


def _wrong_shapes(checkpoint: Checkpoint, prefix: str, linears: Mapping[str, tuple[int, int]]) -> list[str]:
    faults = []
    for linear, shape in linears.items():
        name = f"{prefix}{linear}.weight_shape"
        file = checkpoint.weight_map.get(name)
        with suppress(SafetensorError, OSError), safe_open(checkpoint.folder / str(file), framework="pt") as held:
            if (found := tuple(held.get_tensor(name).tolist())) != shape:
                faults.append(f"{name}: expected {shape}, found {found}")
    return faults
