"""A Llama decoder and a front end of text only, from a model on disk to tokens that are generated."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qe_dist import archs
from qe_dist.core.errors import ConfigError
from qe_dist.data.samples import load_images, read_samples
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.methods.recipes import load_recipe
from qe_dist.serve.loading import load_model
from tests.archs.contract import blocks_of_files_equal_the_loaded_model
from tests.tiny import DATA, MODELS, TRAINING, calibration, samples_for, stories, tiny_model

sys.path.insert(0, str(TRAINING / "real"))
sys.path.insert(0, str(MODELS.parent / "benchmarks" / "quality"))
import build
from dense import write_llama

ARCH = archs.get("llama")
ROTATED = "hadamard+gptq-w4a8"
SMOLLM2_135M = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "rope_theta": 100000, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a checkpoint of it."""
    root = tmp_path_factory.mktemp("llama")
    model, data = tiny_model(root / "model", "llama"), stories(root / "data")
    quantize(RunConfig(model, load_recipe(ROTATED), data, root / ROTATED, sample_tokens=256))
    return root


def test_a_rotated_checkpoint_is_the_loaded_model_bit_for_bit(root: Path) -> None:
    blocks_of_files_equal_the_loaded_model(ARCH, root / ROTATED, samples_for(root / ROTATED))


@pytest.mark.nightly
def test_smollm2_in_its_own_shape_is_quantized_streamed_and_generates(tmp_path: Path) -> None:
    """Real weights: those of `make real`, as the Llama that was published."""
    build.make(tmp_path / "real")
    write_llama(tmp_path / "real" / "lm", tmp_path / "llama")
    data = tmp_path / "few.jsonl"
    lines = (tmp_path / "real" / "data" / "text-calibration.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:8]))
    output = tmp_path / "out"
    quantize(RunConfig(tmp_path / "llama", load_recipe("qe-w4a16g64"), data, output))
    blocks_of_files_equal_the_loaded_model(ARCH, output, read_samples(data)[:2])
    encoder = ARCH.encoder(output)
    prompt = encoder.tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = load_model(output).generate(input_ids=prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in encoder.tokenizer.decode(out[0])


def test_samples_with_images_are_refused(root: Path, tmp_path: Path) -> None:
    data = calibration(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"calibration\.jsonl:1 has images, but .* is a model of text only"):
        quantize(RunConfig(root / "model", load_recipe(ROTATED), data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    sample = read_samples(DATA / "evaluation.jsonl")[0]
    with pytest.raises(ConfigError, match=r"evaluation\.jsonl:1 has images, but .* is a model of text only"):
        ARCH.encoder(root / "model")(sample, load_images(sample))


class _OnMeta:
    """The names and shapes of a model that transformers makes of a configuration."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.folder = config, Path("meta")
        with torch.device("meta"):
            model = ARCH.auto_class().from_config(ARCH.hf_config(config))
        self.tensors: dict[str, Tensor] = dict(model.named_parameters())

    def names(self) -> Any:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)


def test_smollm2_in_its_own_shape_has_the_names_that_we_look_for() -> None:
    source = _OnMeta(json.loads(json.dumps(SMOLLM2_135M)))
    spec = archs.for_config(source.config).spec(source)
    assert spec.passthrough == ("model.embed_tokens.weight", "model.norm.weight")
    assert ARCH.head(source) == "model.embed_tokens.weight"
    assert len(spec.blocks) == 30
    assert spec.blocks[29].prefix == "model.layers.29."
    assert sum(b.num_weights for b in spec.blocks) == 106168320
    assert [g.in_features for g in spec.blocks[0].groups] == [576, 576, 576, 1536]
    sites = ARCH.rotation_sites(source)
    assert sites.widths == {"stream": 576, "head": 64}
    assert {site.source for site in sites.tensors.values()} <= source.tensors.keys()
