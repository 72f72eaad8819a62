"""A run with a rotation: the checkpoint is an ordinary one of a model that computes what the source does."""

import json
from dataclasses import replace

import pytest
import torch

from qe_dist import archs
from qe_dist.core.errors import ConfigError
from qe_dist.flow.calibrate import Embedder
from qe_dist.flow.config import RunConfig
from qe_dist.flow.evaluate import evaluate, save_reference
from qe_dist.flow.local import quantize
from qe_dist.flow.source import open_source
from qe_dist.io.checkpoint import read_manifest
from qe_dist.io.samples import load_images, read_samples
from qe_dist.io.weights import SafetensorsSource, upper_bytes
from qe_dist.methods.recipes import recipe_from
from qe_dist.serve.loading import load_model
from tests.tiny import DATA, calibration, tiny_model

ROTATION = {"rotation": {"name": "hadamard", "seed": 1}}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tied"), config=tiny_config() | {"tie_word_embeddings": True})


def tiny_config():
    return dict(archs.get("qwen2_vl").tiny_config())


@pytest.fixture
def run(tied, tmp_path):
    data = calibration(tmp_path / "data")
    recipe = recipe_from({"scheme": "w8a16"} | ROTATION)
    return RunConfig(tied, recipe, data, tmp_path / "out", samples_per_batch=3, sample_tokens=256)


def kl(run):
    arch = archs.get("qwen2_vl")
    encoder = arch.encoder(run.model)
    samples = read_samples(DATA / "evaluation.jsonl")
    examples = [encoder(s, load_images(s)) for s in (*samples[:4], samples[-1])]
    full = save_reference(load_model(run.model), arch, examples, run.output.with_name("reference"))
    return evaluate(load_model(run.output), arch, examples, full).summary()["kl"]


def test_at_eight_bits_it_is_nearly_the_source_and_the_tied_head_is_stored(run):
    quantize(run)
    assert "lm_head.weight" not in SafetensorsSource(run.model).names()
    loaded = load_model(run.output)
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight
    index = json.loads((run.output / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["lm_head.weight"] == "passthrough-00001.safetensors"
    assert kl(run) < 1e-3


@pytest.mark.parametrize("transform", ["smoothquant", "outlier_smoothing"])
def test_it_combines_with_transforms_and_compensations(run, transform):
    content = {"scheme": "w4a8", "transform": {"name": transform}, "compensation": {"name": "qera"}}
    quantize(replace(run, recipe=recipe_from(content | ROTATION)))
    assert read_manifest(run.output)["recipe"]["rotation"] == {"name": "hadamard", "seed": 1, "octaves": 2.0}
    assert 0 < kl(run) < 0.1


def test_what_the_blocks_are_calibrated_on_is_what_the_checkpoint_computes(run):
    """The first block's input, of a run and of its loaded checkpoint, to the bit."""
    sample = read_samples(run.calibration)[0]
    batch = Embedder(replace(run, output=run.output / "apart"), "qwen2_vl").embed(0, [sample])
    run = replace(run, output=run.output / "run")
    quantize(run)
    arch = archs.get("qwen2_vl")
    example = arch.encoder(run.model)(sample, load_images(sample))
    seen = []
    loaded = load_model(run.output)
    loaded.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        loaded(**arch.model_inputs([example], pad=0), use_cache=False)
    assert torch.equal(seen[0], batch.hidden)


def test_another_rotation_is_another_run(run):
    quantize(run)
    for change, said in (
        ({}, r"recipe\.rotation \(\{.*hadamard.*\} then, None now\)"),
        ({"rotation": {"name": "hadamard", "seed": 2}}, r"recipe\.rotation\.seed \(1 then, 2 now\)"),
    ):
        with pytest.raises(ConfigError, match=said):
            quantize(replace(run, recipe=recipe_from({"scheme": "w8a16"} | change)))


def test_the_plan_counts_the_head_that_was_tied(run):
    arch = archs.get("qwen2_vl")
    plain, turned = open_source(replace(run, recipe=recipe_from({"scheme": "w8a16"}))), open_source(run)
    before, after = (upper_bytes(s, arch.spec(s).passthrough) for s in (plain, turned))
    assert after - before == 4 * 512 * 64


def test_a_model_that_nobody_knows_is_refused(run, tmp_path):
    folder = tiny_model(tmp_path / "unknown")
    (folder / "config.json").write_text(json.dumps(tiny_config() | {"model_type": "gpt9"}))
    with pytest.raises(ConfigError, match=r"model_type 'gpt9'; supported are: .*qwen2_vl"):
        quantize(replace(run, model=folder))
    assert not run.output.exists()
