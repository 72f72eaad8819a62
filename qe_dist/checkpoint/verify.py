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
from qe_dist.core.sample import Sample
from qe_dist.core.source import WeightSource
from qe_dist.io.checkpoint import INDEX, MANIFEST
from qe_dist.io.integrity import file_faults, settings_faults
from qe_dist.io.padded import PaddedSource
from qe_dist.io.publish import DTYPES, read_json
from qe_dist.io.rotated import RotatedSource
from qe_dist.io.weights import SafetensorsSource

SLICE_BYTES = 2**26
"""Of a tensor that is looked at, at a time."""
NEEDED = {
    "config.json": {"quantization_config"}, MANIFEST: {"files", "blocks", "recipe"}, INDEX: {"weight_map"},
}  # fmt: skip
Described = tuple[Any, ...]
"""dtype and shape, as `config.json` says them."""


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint by its descriptions alone."""

    folder: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    weight_map: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, Described]]
    """File -> its tensors, as the files themselves say."""
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Reads JSON and headers. ConfigError where there is no checkpoint of ours."""
        for name in NEEDED:
            if not (folder / name).exists():
                raise ConfigError(f"{folder} has no {name}; give a finished checkpoint of qe-dist")
        said = {name: read_json(folder / name) for name in NEEDED}
        for name, keys in NEEDED.items():
            if missing := keys - {*said[name]}:
                raise CheckpointError(f"{folder / name} has no {min(missing)}: damaged, or not written by this qe-dist")
        tensors, unreadable = {}, {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                tensors[path.name] = _header(path)
            except (SafetensorError, OSError) as error:
                unreadable[path.name] = str(error)
        return cls(folder, said["config.json"], said[MANIFEST], said[INDEX]["weight_map"], tensors, unreadable)

    @property
    def layouts(self) -> list[Mapping[str, Any]]:
        """Of every block."""
        said = self.config["quantization_config"]
        return [said["layouts"][i] for i in said["block_layouts"]]

    def find(self, name: str) -> Described | None:
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
    blocks, layouts, faults = checkpoint.manifest["blocks"], checkpoint.layouts, []
    if len(blocks) != len(layouts):
        return [f"config.json: {len(layouts)} blocks, {MANIFEST} has {len(blocks)}"]
    for block, layout in zip(blocks, layouts, strict=True):
        for name, expected in _described(block["prefix"], layout).items():
            faults += _compare(name, expected, checkpoint.find(name))
    return faults


def check_source(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Every linear of the model that was quantized is there once, all else of it as it was, and nothing more."""
    source = _source(folder, checkpoint.manifest)
    spec = archs.for_config(source.config).spec(source)
    layouts = checkpoint.layouts
    if len(layouts) != len(spec.blocks):
        return [f"config.json: {len(layouts)} blocks, {folder} has {len(spec.blocks)}"]
    faults, expected = [], set(spec.passthrough)
    kept = list(spec.passthrough)
    for block, layout in zip(spec.blocks, layouts, strict=True):
        linears = {x.name: x for group in block.groups for x in group.linears}
        described = [name for group in layout.values() for name in group["linears"]]
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
        expected |= _described(block.prefix, layout).keys()
    for name in kept:
        found = checkpoint.find(name)
        faults += _compare(name, (found[0] if found else "any", *source.shape(name)), found)
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
    example = encoder(Sample(0, "verify", "image", messages=(asked, answer)), [image])
    inputs = {k: v.to(model.device) for k, v in arch.model_inputs([example], pad=0).items()}
    return model(**inputs, use_cache=False).logits[0, -1].float()


def _source(folder: Path, manifest: Mapping[str, Any]) -> WeightSource:
    """Names and shapes of the model that was quantized: rotated, it may have a head that was tied; padded, its MLPs are
    wider."""
    source: WeightSource = SafetensorsSource(folder)
    arch = archs.for_config(source.config)
    if manifest["recipe"].get("rotation") is not None:
        source = RotatedSource(source, arch.rotation_sites(source), bases={})
    if "padding" in manifest:
        width = manifest["padding"][1]
        source = PaddedSource(source, arch.spec(source), arch.widened(source.config, width), width)
    return source


def _header(path: Path) -> dict[str, Described]:
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {n: (_named(p.get_dtype()), *p.get_shape()) for n, p in parts.items()}


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


def _described(prefix: str, layout: Mapping[str, Any]) -> dict[str, Described]:
    """Full name -> dtype and shape of the quantized tensors of a block."""
    found = {}
    for group, content in layout.items():
        modules = {f"{group}_input": content["input"], **content["linears"]}
        found |= {
            f"{prefix}{m}.{name}": tuple(said) for m, tensors in modules.items() for name, said in tensors.items()
        }
    return found


def _compare(name: str, expected: Described, found: Described | None) -> list[str]:
    if found is None:
        return [f"{name}: missing"]
    return [] if found == expected else [f"{name}: expected {_shown(expected)}, found {_shown(found)}"]


def _wrong_shapes(checkpoint: Checkpoint, prefix: str, linears: Mapping[str, tuple[int, int]]) -> list[str]:
    faults = []
    for linear, shape in linears.items():
        name = f"{prefix}{linear}.weight_shape"
        file = checkpoint.weight_map.get(name)
        with suppress(SafetensorError, OSError), safe_open(checkpoint.folder / str(file), framework="pt") as held:
            if (found := tuple(held.get_tensor(name).tolist())) != shape:
                faults.append(f"{name}: expected {shape}, found {found}")
    return faults


def _shown(described: Described) -> str:
    return f"{described[0]} {list(described[1:])}"
