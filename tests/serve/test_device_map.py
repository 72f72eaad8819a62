"""`device_map`: whole, or with blocks that are on disk while they do not run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qe_dist import archs
from qe_dist.core.errors import ConfigError
from qe_dist.data.samples import load_images, read_samples
from qe_dist.serve.linear import QELinear
from tests.tiny import DATA, MODELS

ARCH = archs.get("qwen2_vl")
BLOCKS = "model.language_model.layers"
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def load(checkpoints: dict[str, Path]) -> Load:
    from transformers import AutoModelForImageTextToText

    folder = checkpoints["qe-extract-w4a6"]
    return lambda **options: AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options)


def answer(model: Any) -> torch.Tensor:
    """Logits of four greedy steps after a question about an image."""
    sample = read_samples(DATA / "evaluation.jsonl")[0]
    inputs = ARCH.model_inputs([ARCH.encoder(MODELS / "outlier").prompt(sample, load_images(sample))], pad=0)
    out = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True,
        output_logits=True, pad_token_id=0,
    )  # fmt: skip
    return torch.cat(out.logits)


@pytest.fixture(scope="module")
def whole(load: Load) -> torch.Tensor:
    return answer(load())


def every_second_block_on_disk() -> dict[str, str]:
    blocks = {f"{BLOCKS}.{index}": "disk" if index % 2 else "cpu" for index in range(6)}
    parts = ("embed_tokens", "norm", "rotary_emb")
    return blocks | {"model.visual": "cpu", "lm_head": "cpu"} | {f"model.language_model.{p}": "cpu" for p in parts}


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_all_in_one_place(load: Load, whole: torch.Tensor, device_map: Any) -> None:
    assert torch.equal(answer(load(device_map=device_map)), whole)


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": every_second_block_on_disk()},
        {"device_map": "auto", "max_memory": {"cpu": "2MiB"}},
    ],
    ids=["some blocks", "what does not fit"],
)
def test_with_blocks_on_disk(load: Load, whole: torch.Tensor, options: dict[str, Any], tmp_path: Path) -> None:
    model = load(**options, offload_folder=tmp_path)
    away = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert any(name.startswith(BLOCKS) for name in away)
    assert torch.equal(answer(model), whole)
    assert torch.equal(answer(model), whole)
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == away


def test_what_was_made_of_offloaded_weights_goes_with_them(load: Load, tmp_path: Path) -> None:
    model = load(device_map=every_second_block_on_disk(), offload_folder=tmp_path)
    answer(model)
    for index, block in enumerate(model.get_decoder().layers):
        linears = [module for module in block.modules() if isinstance(module, QELinear)]
        assert {linear._linear is not None for linear in linears} == {index % 2 == 0}


def test_a_part_of_a_block_is_not_offloaded(load: Load, tmp_path: Path) -> None:
    map = every_second_block_on_disk()
    del map[f"{BLOCKS}.3"]
    parts = ("self_attn", "input_layernorm", "post_attention_layernorm")
    map |= {f"{BLOCKS}.3.mlp": "disk"} | {f"{BLOCKS}.3.{part}": "cpu" for part in parts}
    with pytest.raises(ConfigError, match=r"device_map offloads only a part of model\.language_model\.layers\.3;"):
        load(device_map=map, offload_folder=tmp_path)
