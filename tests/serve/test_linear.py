"""The modules in a transformers model: which twin runs them does not matter, and running them loses nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qe_dist import archs
from qe_dist.data.samples import load_images, read_samples
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.methods.recipes import load_recipe
from qe_dist.serve import linear, on_kernels
from qe_dist.serve.linear import QELinear
from tests.tiny import DATA, calibration, tiny_model

RECIPES = (
    "rtn-w4a16g32",
    "smoothquant+gptq+qera-w4a8@0.5f4",
    "qe-extract-w4a8",
    "lists+gptq+qera-w4a8",
    "masquant-w4a8",
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    source, data = tiny_model(root / "source"), calibration(root / "data")
    quantize(*(RunConfig(source, load_recipe(name), data, root / name, sample_tokens=256) for name in RECIPES))
    return {name: root / name for name in RECIPES}


def load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any, folder: Path) -> Tensor:
    """Of a question about an image, and of a text."""
    arch, samples = archs.get("qwen2_vl"), read_samples(DATA / "evaluation.jsonl")
    encoder = arch.encoder(folder)
    asked = [encoder.prompt(samples[0], load_images(samples[0])), encoder(samples[-1], [])]
    inputs = {n: t.to(model.dtype) if n == "pixel_values" else t for n, t in arch.model_inputs(asked, pad=0).items()}
    return model(**inputs, use_cache=False).logits.float()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_kernels_run_a_whole_model(
    recipe: str, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as 16 bits may differ from 32: not more than the plain formula in 16 bits does, within a factor."""
    folder = checkpoints[recipe]
    exact, plain = logits(load(folder, torch.float32), folder), logits(load(folder, torch.bfloat16), folder)
    monkeypatch.setattr(linear, "backend", lambda device, dtype: on_kernels)
    found = logits(load(folder, torch.bfloat16), folder)
    assert (found - exact).norm() <= 1.5 * (plain - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_that_has_run_is_saved_as_it_was(recipe: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = checkpoints[recipe]
    model = load(folder, torch.float32)
    before = logits(model, folder)
    assert all(m.weight_packed.numel() == 0 for m in model.modules() if isinstance(m, QELinear)), "in use"
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, torch.float32), folder), before)
    written = load_file(tmp_path / "model.safetensors")
    read = {name: t for path in folder.glob("block-*.safetensors") for name, t in load_file(path).items()}
    packed = [name for name in read if name.endswith("weight_packed")]
    assert packed
    assert all(torch.equal(read[name], written[name]) for name in packed)


def test_a_model_may_be_moved_after_it_has_run(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["qe-extract-w4a8"]
    model = load(folder, torch.float32)
    before = logits(model, folder)
    assert torch.equal(logits(model.to(torch.device("cpu")), folder), before)
