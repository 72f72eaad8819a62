"""Models as people have them, from end to end: what quantize accepts, verify finds no fault with, transformers loads,
and its reference computes what the folder stands for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qe_dist.checkpoint.verify import Checkpoint, check_hashes, check_index, check_layout, check_source
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.methods.recipes import load_recipe
from qe_dist.serve.loading import load_model
from tests.gate import in_gate
from tests.tiny import calibration, tiny_model

HEAD = "lm_head.weight"


def surplus(model: Path, tensors: dict, config: dict) -> None:
    tensors["lora_A.default.weight"] = torch.ones(4, 4)
    tensors["model.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["visual.embeddings.position_ids"] = torch.arange(5)


def deeper(model: Path, tensors: dict, config: dict) -> None:
    """The files have a block more than config.json."""
    for name in [n for n in tensors if ".layers.1." in n]:
        tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name].clone()


def head_alone(model: Path, tensors: dict, config: dict) -> None:
    del tensors[next(n for n in tensors if n.endswith("embed_tokens.weight"))]
    config["tie_word_embeddings"] = True


def untied_by_its_tensors(model: Path, tensors: dict, config: dict) -> None:
    config["tie_word_embeddings"] = True


def fp8(model: Path, tensors: dict, config: dict) -> None:
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        scale = tensors[name].float().abs().amax(1, keepdim=True) / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
        tensors[name.replace(".weight", ".input_scale")] = torch.ones(())
    config["quantization_config"] = {"quant_method": "fp8"}


def classless(model: Path, tensors: dict, config: dict) -> None:
    del config["architectures"]


def no_padding(model: Path, tensors: dict, config: dict) -> None:
    config["text_config"]["pad_token_id"] = -1


CHANGES = (surplus, deeper, head_alone, untied_by_its_tensors, fp8, classless, no_padding)


CASES = [(change, recipe) for change in CHANGES for recipe in ("rtn-w4a8", "hadamard-w4a6")]
IN_GATE = [(surplus, "rtn-w4a8"), (head_alone, "hadamard-w4a6"), (fp8, "rtn-w4a8")]


@pytest.mark.parametrize(("change", "recipe"), in_gate(IN_GATE, CASES))
def test_what_is_accepted_is_quantized_verified_and_loaded(tmp_path, change, recipe):
    model = tiny_model(tmp_path / "model")
    tensors, config = load_file(model / "model.safetensors"), json.loads((model / "config.json").read_text())
    change(model, tensors, config)
    save_file({n: t.contiguous() for n, t in tensors.items()}, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config))

    run = RunConfig(model, load_recipe(recipe), calibration(tmp_path / "data"), tmp_path / "out")
    quantize(run)

    checkpoint = Checkpoint.open(run.output)
    for check in (check_hashes, check_index, check_layout, lambda c: check_source(c, model)):
        assert check(checkpoint) == []
    assert checkpoint.config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    quantized, full = load_model(run.output), load_model(model)
    rotated = recipe.startswith("hadamard")  # which gives a tied model a head of its own
    for one, tied in ((full, change is head_alone), (quantized, change is head_alone and not rotated)):
        head = one.get_output_embeddings().weight
        assert (head is one.get_input_embeddings().weight) is tied
        assert (one is quantized and rotated) or torch.equal(head, tensors[HEAD].float())
    if change is fp8:
        name = next(n for n in tensors if n.endswith("q_proj.weight"))
        wanted = (tensors[name].float() * tensors[f"{name}_scale"]).bfloat16().float()
        found = next(p for n, p in full.named_parameters() if n.endswith("layers.0.self_attn.q_proj.weight"))
        assert torch.equal(found, wanted)
