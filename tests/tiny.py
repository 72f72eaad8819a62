"""A two-block model of random weights on disk, in a moment; tokenizer and image processor are the bundled ones."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qe_dist import archs
from qe_dist.core.sample import Sample
from qe_dist.data.samples import read_samples

MODELS = Path(__file__).parent.parent / "models"
DATA = MODELS / "data"
TRAINING = MODELS.parent / "training"


def tiny_model(
    folder: Path,
    arch: str = "qwen2_vl",
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes the model under the names that published checkpoints use. config: the architecture's tiny one."""
    from transformers import AutoConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = config or archs.get(arch).tiny
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    offset = archs.get(arch).decoder.gain_offset
    model = archs.get(arch).auto_class().from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter) - offset)
                parameter[3] = 20.0 - offset  # an outlier channel
            elif parameter.ndim == 2:
                parameter.normal_(0, 0.1)
    model.to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(MODELS / "plain" / name, folder / name)
    if archs.get(arch).has_vision(config):
        processor = json.loads((MODELS / "plain" / "preprocessor_config.json").read_text())
        sizes = {"patch_size": model.config.vision_config.patch_size}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor | sizes))
    return folder


def stir(folder: Path) -> Path:
    """Gives every bias, and every gain that is 1 in all channels, stored as 1 or as 0, random numbers, so that none can
    be left out."""
    weights = load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if name.endswith("bias"):
            tensor.normal_(0, 0.5, generator=random)
        elif tensor.ndim == 1 and bool((tensor == 1).all()):
            tensor.uniform_(0.5, 2.0, generator=random)
        elif tensor.ndim == 1 and "norm" in name and bool((tensor == 0).all()):
            tensor.uniform_(-0.5, 1.0, generator=random)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def samples_for(folder: Path) -> list[Sample]:
    """A conversation and two other samples of the bundled evaluation set: two images of different size, and plain text;
    text alone for a model that sees no images."""
    config = json.loads((folder / "config.json").read_text())
    samples = read_samples(DATA / "evaluation.jsonl")
    if archs.for_checkpoint(config).has_vision(config):
        return [samples[0], samples[6], samples[-1]]
    said = [("user", "What is an apple?"), ("assistant", "A fruit.")]
    messages = tuple({"role": role, "content": [{"type": "text", "text": text}]} for role, text in said)
    return [Sample(0, "here:1", "text", messages), *[sample for sample in samples if sample.text][-2:]]


def with_blocks(count: int, arch: str = "qwen2_vl") -> dict[str, Any]:
    """The tiny configuration, deeper."""
    config = dict(archs.get(arch).tiny)
    return config | {"text_config": config["text_config"] | {"num_hidden_layers": count}}


def stories(folder: Path, count: int = 6) -> Path:
    """The last lines of the bundled calibration set, which are text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "stories.jsonl"
    path.write_text("\n".join((DATA / "calibration.jsonl").read_text().splitlines()[-count:]) + "\n")
    return path


def calibration(folder: Path, count: int = 6) -> Path:
    """The first conversations and one story of the bundled calibration set, beside links to its images."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (DATA / "calibration.jsonl").read_text().splitlines()
    images = folder / "calibration"
    if not images.exists():
        images.symlink_to(DATA / "calibration")
    path = folder / "calibration.jsonl"
    path.write_text("\n".join([*lines[: count - 1], lines[-1]]) + "\n")
    return path
