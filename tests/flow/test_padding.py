"""A model that is padded for a tensor-parallel size computes what it did, and every recipe takes its dead channels."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qe_dist import archs, methods
from qe_dist.checkpoint.verify import Checkpoint, check_finite, check_index, check_layout, check_source
from qe_dist.core.errors import ConfigError
from qe_dist.data.samples import load_images, read_samples
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.flow.source import open_source
from qe_dist.io.checkpoint import read_manifest
from qe_dist.io.padded import PaddedSource
from qe_dist.io.weights import SafetensorsSource
from qe_dist.methods.recipes import METHODS, load_recipe, recipe_from
from qe_dist.numerics.packing import unpack
from qe_dist.serve.loading import load_model
from tests.gate import in_gate
from tests.tiny import DATA, MODELS, calibration, tiny_model

BEFORE, AFTER = 96, 128  # two ranks, each with one tile of 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(folder, tmp_path):
    return RunConfig(
        folder, load_recipe("rtn-w4a8"), calibration(tmp_path / "data", 4), tmp_path / "out",
        samples_per_batch=2, sample_tokens=64, tensor_parallel_size=2,
    )  # fmt: skip


def files(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def tensors(output):
    return {name: tensor for path in output.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_padded_source_is_the_model_with_zeros_behind(folder):
    plain = SafetensorsSource(folder)
    arch = archs.for_config(plain.config)
    wide = PaddedSource(plain, arch.spec(plain), arch.widened(plain.config, AFTER), AFTER)
    assert wide.config["text_config"] == plain.config["text_config"] | {"intermediate_size": AFTER}
    grown = set()
    for name in wide.names():
        was, now = plain.get(name), wide.get(name)
        assert wide.shape(name) == now.shape
        assert now.dtype == was.dtype
        assert torch.equal(now[tuple(map(slice, was.shape))], was)
        assert now.float().abs().sum() == was.float().abs().sum()
        if now.shape != was.shape:
            grown.add(name.partition("mlp.")[2])
    assert grown == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}


@pytest.mark.parametrize("at_top", [False, True])
def test_the_width_is_told_where_the_config_has_it(at_top):
    arch, config = archs.get("qwen2_vl"), json.loads((MODELS / "plain" / "config.json").read_text())
    if at_top:  # as published
        config |= config.pop("text_config") | {"model_type": "qwen2_vl"}
    assert [group.in_features for group in arch.groups(config)] == [256, 256, 256, 640]
    assert [group.in_features for group in arch.groups(arch.widened(config, 768))] == [256, 256, 256, 768]


@torch.no_grad()
def test_the_bundled_model_computes_the_same_with_768_channels_as_with_640():
    """In float64, where nothing but the order of sums could differ."""
    arch = archs.get("qwen2_vl")
    run = RunConfig(MODELS / "plain", load_recipe("rtn-w4a16g128"), DATA / "calibration.jsonl", DATA / "none")
    plain, wide = open_source(run), open_source(replace(run, tensor_parallel_size=2))
    assert (arch.groups(plain.config)[-1].in_features, arch.groups(wide.config)[-1].in_features) == (640, 768)
    encoder = arch.encoder(plain.folder)
    examples = [encoder(s, load_images(s)) for s in read_samples(DATA / "evaluation.jsonl")[:2]]
    hidden = []
    for source in (plain, wide):
        batch = arch.prelude(source, "cpu", torch.float64)(examples, 0)
        for spec in arch.spec(source).blocks:
            batch = batch.with_hidden(arch.run_block(arch.block(source, spec, "cpu", torch.float64), batch, spec.index))
        hidden.append(batch.hidden)
    assert (hidden[1] - hidden[0]).abs().max() < 1e-13 * hidden[0].abs().max()


EVERY = sorted({*METHODS, *(f"{q}+qera" for q in methods.names("quantizer"))} - {"masquant"})


@pytest.mark.parametrize("name", in_gate(("gptq+qera", "qe", "obq+qera"), EVERY))
def test_every_recipe_takes_dead_channels_and_its_checkpoint_loads(run, name):
    recipe = load_recipe(f"{name}-w4a6")  # but for dynamic outlier channels, which two ranks cannot have
    quantize(replace(run, recipe=replace(recipe, scheme=replace(recipe.scheme, dynamic_outliers=None))))
    checkpoint = Checkpoint.open(run.output)
    for check in (check_finite, check_index, check_layout):
        assert check(checkpoint) == []
    assert check_source(checkpoint, run.model) == []
    assert checkpoint.manifest.fallbacks == {}
    assert checkpoint.manifest.padding == [BEFORE, AFTER]
    model, arch = load_model(run.output), archs.get("qwen2_vl")
    sample = read_samples(run.calibration)[0]
    inputs = arch.model_inputs([arch.encoder(run.output)(sample, load_images(sample))], pad=0)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert model.config.text_config.intermediate_size == AFTER


@pytest.mark.parametrize("name", ["rtn-w4a8", "gptq-w4a16g32", "qera-w4a6"])
def test_the_codes_of_dead_channels_are_zero(run, name):
    quantize(replace(run, recipe=load_recipe(name)))
    found = tensors(run.output)
    prefix = read_manifest(run.output).blocks[1].prefix
    for linear, width in (("gate_proj", 64), ("up_proj", 64), ("down_proj", AFTER)):
        codes = unpack(found[f"{prefix}mlp.{linear}.weight_packed"], 4, width)
        dead = codes[:, BEFORE:] if linear == "down_proj" else codes[BEFORE:]
        assert dead.numel()
        assert not dead.any()


def test_plain_rounding_is_that_of_the_model_as_it_was(run):
    """Dead channels change no scale and no code of the others."""
    quantize(run)
    bare = replace(run, tensor_parallel_size=1, output=run.output.parent / "bare")
    quantize(bare)
    was, now = tensors(bare.output), tensors(run.output)
    assert was.keys() == now.keys()
    for name in was:
        if not name.endswith("weight_shape"):
            assert torch.equal(now[name][tuple(map(slice, was[name].shape))], was[name]), name


def test_bits_count_what_is_stored_for_the_weights_that_the_model_has(run):
    quantize(run)
    manifest = read_manifest(run.output)
    stored = sum(g.bytes for block in manifest.blocks for g in block.groups.values())
    weights = sum(block.num_weights for block in archs.get("qwen2_vl").spec(SafetensorsSource(run.model)).blocks)
    assert manifest.bits_per_weight == 8 * stored / weights
    assert json.loads((run.output / "config.json").read_text())["text_config"]["intermediate_size"] == AFTER


def test_one_rank_changes_nothing(run, folder):
    one = replace(run, tensor_parallel_size=1)
    assert open_source(one).config == SafetensorsSource(folder).config
    quantize(one)
    assert read_manifest(one.output).padding is None


def test_a_padded_run_continues_and_another_size_is_another_run(run):
    quantize(run)
    before = files(run.output)
    (run.output / "config.json").unlink()
    (run.output / "block-00001.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"differs in tensor_parallel_size \(2 then, 1 now\)"):
        quantize(replace(run, tensor_parallel_size=1))
    quantize(replace(run, resume="required", blocks_per_worker=1))
    assert files(run.output) == before


@pytest.mark.parametrize("online", [False, True])
def test_a_rotated_model_is_padded_like_any(run, online):
    """A rotation at run time mixes what one rank has, so its rounded weights are others, but no further off."""
    recipe = recipe_from({"scheme": "w8a16", "rotation": {"name": "hadamard", "online": online}})
    quantize(replace(run, recipe=recipe))
    assert check_source(Checkpoint.open(run.output), run.model) == []
    plain = replace(run, recipe=recipe, tensor_parallel_size=1, output=run.output.parent / "plain")
    quantize(plain)
    arch, sample = archs.get("qwen2_vl"), read_samples(run.calibration)[0]
    inputs = arch.model_inputs([arch.encoder(run.output)(sample, load_images(sample))], pad=0)
    with torch.no_grad():
        wide, narrow, exact = (load_model(folder)(**inputs).logits for folder in (run.output, plain.output, run.model))
    if online:
        assert (wide - exact).norm() < 1.2 * (narrow - exact).norm() < 0.03 * exact.norm()
    else:
        assert (wide - narrow).abs().max() < 1e-3 * narrow.abs().max()


def test_recipes_of_one_model_must_pad_it_alike(run, tmp_path):
    wide = load_recipe("rtn-w4a16g32")
    with pytest.raises(ConfigError, match="pad the model differently: they need a pass each"):
        quantize(run, replace(run, recipe=replace(wide, scheme=replace(wide.scheme, group_size=128)), output=tmp_path))
    quantize(run)
    other = replace(wide, scheme=replace(wide.scheme, group_size=96))
    with pytest.raises(ConfigError, match="from block 1 on the model would be padded differently"):
        quantize(replace(run, recipe=other, from_block=1))


def test_damage_of_a_padded_checkpoint_is_seen(run, tmp_path):
    quantize(run)
    copy = shutil.copytree(run.output, tmp_path / "copy")
    manifest = json.loads((copy / "qe_manifest.json").read_text())
    del manifest["padding"]
    (copy / "qe_manifest.json").write_text(json.dumps(manifest))
    assert any(
        "expected (96, 64), found (128, 64)" in fault for fault in check_source(Checkpoint.open(copy), run.model)
    )
