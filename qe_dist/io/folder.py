"""What a place is that holds no model which can be read, and what to do about it."""

import json
import re
from collections.abc import Collection
from pathlib import Path

from qe_dist.io.files import Files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")
OTHER_FORMATS = (
    (r".*\.gguf", "a GGUF file; give the model that it was made of, as safetensors"),
    (r".*\.onnx", "an ONNX file; give the model that it was made of, as safetensors"),
    (
        r"pytorch_model.*\.bin(\.index\.json)?|consolidated.*\.pth?|.*\.(ckpt|pt|pth)",
        "a pickle of PyTorch, which may run code when it is opened; save the model again as safetensors: "
        "from_pretrained(...) and save_pretrained(...) of transformers",
    ),
    (r"(tf_model|flax_model|model)\.(h5|msgpack)", "a model of TensorFlow or Flax; give its safetensors"),
    (r"consolidated.*\.safetensors|params\.json", "a model in the form of its makers; give the one for transformers"),
)
"""Names of files, and what they are. The first that is there is told."""


def no_config(files: Files) -> str:
    """Why a place without config.json is no model, in one line."""
    names, place = files.names(), files.shown("config.json")
    folder = files.folder
    if "adapter_config.json" in names:
        return (
            f"{files.shown('')} is a LoRA adapter{_base_of(folder)}: {place} does not exist. Merge it into its model "
            "(merge_and_unload of peft), save that, and give its folder"
        )
    if (folder / "snapshots").is_dir():
        found = sorted(path.name for path in (folder / "snapshots").iterdir())
        example = f", such as {folder / 'snapshots' / found[-1]}" if found else ""
        return f"{folder} is a folder of the Hugging Face cache; give the model's name, or a snapshot in it{example}"
    if (other := _other_format(names)) is not None:
        return f"{files.shown(other[0])} is {other[1]}"
    if not names and not folder.exists():
        return f"{place} does not exist; expected a Hugging Face model directory, and {folder} is none"
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    there = f"; did you mean {folder / inside[0]}?" if inside else ""
    return f"{place} does not exist; expected a Hugging Face model directory{there}"


def no_weights(files: Files) -> str:
    """Why a folder with config.json holds no tensors that can be read, in one line."""
    names, missing = files.names(), f"{files.shown(SINGLE)} is missing"
    if shards := sorted(filter(SHARD.fullmatch, names)):
        return f"{files.shown(INDEX)} is missing, and {shards[0]} needs it: it says which tensor is where; copy it"
    if (other := _other_format(names)) is not None:
        return f"{missing}, and {other[0]} is {other[1]}"
    if found := sorted(name for name in names if name.endswith(".safetensors")):
        if found[0].startswith("adapter_model"):
            return f"{missing}: beside config.json there is a LoRA adapter alone; merge it into its model and give that"
        return f"{missing}, and {found[0]} is not one of its names; rename it if it is the whole model"
    return f"{missing}; a model directory needs every safetensors shard that its index names"


def named_by_file(place: Path) -> str:
    """What to do about a path that is a file, in one line."""
    for pattern, what in OTHER_FORMATS:
        if re.fullmatch(pattern, place.name):
            return f"{place} is {what}"
    return f"{place} is a file; give the folder of a model, such as {place.parent}"


def _other_format(names: Collection[str]) -> tuple[str, str] | None:
    for pattern, what in OTHER_FORMATS:
        if found := sorted(name for name in names if re.fullmatch(pattern, name)):
            return found[0], what
    return None


def _base_of(folder: Path) -> str:
    """` of NAME`, as the adapter's own file says it."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        return f" of {base}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
