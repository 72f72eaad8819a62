"""Block by block, a model and its checkpoints give the numbers that they give whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from qe_pipelines.evaluate import encode, loaded, streamed

from qe_dist.checkpoint.evaluate import measure, save_states
from qe_dist.core.errors import ConfigError
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.methods.recipes import load_recipe
from qe_dist.serve.blocks import open_blocks
from tests.tiny import calibration, tiny_model

RECIPES = ("qe-paper-w4a6", "hadamard+gptq-w4a8", "masquant-w4a16g32")
"""Routed experts; a rotated model, whose head is not the source's; scales by modality."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("stream")
    model, data = tiny_model(root / "model"), calibration(root / "data", 5)
    for name in RECIPES:
        quantize(RunConfig(model, load_recipe(name), data, root / name, sample_tokens=256))
    arch, examples = encode(model, data)
    whole = save_states(loaded(model, arch, root), examples, root / "whole")
    blocks = save_states(streamed(model, arch, root / "work"), examples, root / "blocks")
    return {"root": root, "model": model, "arch": arch, "examples": examples, "whole": whole, "blocks": blocks}


@pytest.mark.parametrize("name", [*RECIPES, "model"])
def test_numbers_are_those_of_the_whole_model(made: dict[str, Any], name: str) -> None:
    folder, arch, examples = made["root"] / name, made["arch"], made["examples"]
    whole = measure(loaded(folder, arch, made["root"]), examples, made["whole"])
    blocks = measure(streamed(folder, arch, made["root"] / "work"), examples, made["blocks"], tokens=300)
    for mine, other in zip(whole.scores, blocks.scores, strict=True):
        assert (mine.index, mine.modality, mine.tokens, mine.exact) == (
            other.index, other.modality, other.tokens, other.exact
        )  # fmt: skip
        assert mine.nll == pytest.approx(other.nll, rel=1e-5)
        assert mine.kl == pytest.approx(other.kl, rel=1e-4, abs=1e-6)
        assert abs(mine.agreed - other.agreed) <= 1
    assert name == "model" or whole.summary()["kl"] > 1e-4


def test_nothing_is_left_between_blocks(made: dict[str, Any]) -> None:
    assert list((made["root"] / "work").rglob("*.safetensors")) == []


def test_a_checkpoint_that_others_quantized_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    (tmp_path / "model.safetensors").write_bytes((made["model"] / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"quantized by awq.*leave out --stream"):
        open_blocks(tmp_path, made["arch"], "cpu", torch.float32)
