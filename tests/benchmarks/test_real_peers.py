"""What peers write is read as they mean it, and measured with rounded activations where theirs are."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quality(monkeypatch):
    """Imports a file of benchmarks/quality, which are scripts and no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "quality")
    return importlib.import_module


def packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, N] numbers as one integer of N * bits bits for each row, cut into words of 32."""
    rows = []
    for row in numbers.tolist():
        stream = sum(number << (bits * i) for i, number in enumerate(row))
        words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(row) * bits // 32)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_numbers_are_unpacked(quality, bits):
    numbers = torch.randint(2**bits, (3, 64), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(quality("dense").unpack(packed(numbers, bits), bits), numbers)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("form", "less"), [("auto_round:auto_gptq", 1), ("auto_round", 0)])
def test_weights_of_autoround_are_codes_less_zero_point_times_scale(quality, tmp_path, bits, form, less):
    """Scales may be negative: its symmetric grid has one code more on the side of the largest weight."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (32, 128), generator=random)
    scales = torch.randn(32, 2, generator=random).half()
    zero = 2 ** (bits - 1)
    tensors = {
        "qweight": packed(codes, bits).T.contiguous(),
        "qzeros": packed(torch.full((2, 32), zero - less), bits),
        "scales": scales.T.contiguous(),
    }
    save_file({f"model.layers.0.mlp.up_proj.{k}": t for k, t in tensors.items()}, tmp_path / "model.safetensors")
    quantization = {"packing_format": form, "bits": bits, "group_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    found = quality("dense").read_autoround(tmp_path)
    expected = torch.stack([(codes[:, i] - zero) * scales[:, i // 64].float() for i in range(128)], dim=1)
    assert list(found) == ["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], expected)


def test_a_dense_model_has_the_new_weights_and_rounds_activations_where_asked(quality, tmp_path):
    from qe_dist.serve.loading import load_model

    model = tiny_model(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    weights = {name: 0.1 * torch.randn_like(load_file(model / "model.safetensors")[name].float())}
    for bits, folder in ((None, tmp_path / "a16"), (8, tmp_path / "a8")):
        quality("dense").write_dense(model, weights, folder, bits)
    ids = torch.arange(20, 60)[None]
    logits = []
    for folder in ("a16", "a8"):
        loaded = load_model(tmp_path / folder)
        assert torch.equal(loaded.model.language_model.layers[1].mlp.up_proj.weight, weights[name])
        logits.append(loaded(ids).logits)
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 1e-4 < error < 0.1


def test_biases_are_not_lost_on_the_way_to_a_llama(quality, tmp_path):
    model = tiny_model(tmp_path / "model")
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.q_proj.bias"] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"q_proj\.bias"):
        quality("dense").write_llama(model, tmp_path / "llama")
