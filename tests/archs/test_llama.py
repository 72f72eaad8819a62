"""A Llama decoder and a front end of text only, from a model on disk to tokens that are generated."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qe_dist import archs
from qe_dist.core.batch import PADDING
from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import Sample
from qe_dist.data.samples import load_images, read_samples
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.methods.recipes import load_recipe
from qe_dist.serve.blocks import open_blocks
from qe_dist.serve.loading import load_model
from tests.tiny import DATA, MODELS, calibration, samples_for, stories, tiny_model

sys.path.insert(0, str(MODELS / "real"))
sys.path.insert(0, str(MODELS.parent / "benchmarks" / "quality"))
import build
from dense import write_llama

ARCH = archs.get("llama")
RECIPES = ("qe-paper-w4a6", "hadamard+gptq-w4a8")
SMOLLM2_135M = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "rope_theta": 100000, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and its checkpoints by all recipes."""
    root = tmp_path_factory.mktemp("llama")
    model, data = tiny_model(root / "model", "llama"), stories(root / "data")
    for name in RECIPES:
        quantize(RunConfig(model, load_recipe(name), data, root / name, sample_tokens=256))
    return root


@pytest.mark.parametrize("name", ["model", *RECIPES])
def test_block_by_block_is_the_loaded_model_bit_for_bit(name: str, root: Path) -> None:
    check_block_by_block(root / name, samples_for(root / name))


@torch.no_grad()
def check_block_by_block(folder: Path, samples: list[Sample]) -> None:
    """Logits of the whole model are those of its blocks one after the other."""
    encoder, model = ARCH.encoder(folder), load_model(folder)
    examples = [encoder(sample, []) for sample in samples]
    source, blocks = open_blocks(folder, ARCH, "cpu", torch.float32)
    batch = ARCH.prelude(source, "cpu", torch.float32)(examples, 0)
    for load in blocks:
        batch = batch.with_hidden(load()(batch))
    hidden = ARCH.last_norm(source, "cpu", torch.float32)(batch.hidden)
    whole = model(**ARCH.model_inputs(examples, pad=0), use_cache=False).logits
    real = batch.modality != PADDING
    assert torch.equal((hidden @ source.get(ARCH.head(source)).float().T)[real], whole[real])
    assert whole.std() > 0.1


@pytest.mark.parametrize("name", RECIPES)
def test_a_checkpoint_generates(name: str, root: Path) -> None:
    prompt = ARCH.encoder(root / name).prompt(samples_for(root / name)[0], [])
    inputs = ARCH.model_inputs([prompt], pad=0)
    out = load_model(root / name).generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert out.shape[1] == len(prompt.input_ids) + 5


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
    check_block_by_block(output, read_samples(data)[:2])
    encoder = ARCH.encoder(output)
    prompt = encoder.tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = load_model(output).generate(input_ids=prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in encoder.tokenizer.decode(out[0])


def test_samples_with_images_are_refused(root: Path, tmp_path: Path) -> None:
    data = calibration(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"calibration\.jsonl:1 has images, but .* is a model of text only"):
        quantize(RunConfig(root / "model", load_recipe(RECIPES[0]), data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    sample = read_samples(DATA / "evaluation.jsonl")[0]
    with pytest.raises(ConfigError, match=r"evaluation\.jsonl:1 has images, but the model is one of text only"):
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
