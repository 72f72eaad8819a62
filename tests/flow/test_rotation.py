"""A run with a rotation: the checkpoint is one of a model that computes what the source does."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qe_dist import archs
from qe_dist.checkpoint.evaluate import evaluate, save_reference
from qe_dist.checkpoint.export import export
from qe_dist.checkpoint.serving import serving_problems
from qe_dist.checkpoint.tp_check import check_ranks
from qe_dist.checkpoint.verify import Checkpoint, check_layout, check_source
from qe_dist.core.errors import ConfigError
from qe_dist.data.samples import load_images, read_samples
from qe_dist.flow.calibrate import Embedder
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.flow.source import open_source
from qe_dist.io.checkpoint import read_manifest
from qe_dist.io.weights import SafetensorsSource, upper_bytes
from qe_dist.methods.recipes import recipe_from
from qe_dist.serve.loading import load_model
from tests.tiny import DATA, calibration, tiny_model

ROTATION = {"rotation": {"name": "hadamard", "seed": 1, "ranks": 1}}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tied"), config=tiny_config() | {"tie_word_embeddings": True})


def tiny_config():
    return dict(archs.get("qwen2_vl").tiny)


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
    assert read_manifest(run.output).recipe["rotation"] == {
        "name": "hadamard", "seed": 1, "octaves": 0.0, "online": True, "ranks": 1,
    }  # fmt: skip
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


def logits(model, folder):
    arch = archs.get("qwen2_vl")
    encoder = arch.encoder(folder)
    samples = read_samples(DATA / "evaluation.jsonl")
    inputs = arch.model_inputs([encoder(s, load_images(s)) for s in (samples[0], samples[-1])], pad=0)
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def dense(tensors):
    """H by its definition, of the factors on disk, in float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for name in sorted(n for n in tensors if ".rotation_" in n):
        matrix = torch.kron(matrix, tensors[name].double())
    assert torch.equal(matrix @ matrix.T, len(matrix) * torch.eye(len(matrix), dtype=torch.float64))
    return matrix / len(matrix) ** 0.5


def test_the_stored_weight_of_down_and_its_error_are_those_of_an_independent_computation(run):
    """In float64, from the source's tensors and dense matrices: x H on a grid times the grid of W H, against x W."""
    run = replace(run, recipe=recipe_from({"scheme": "w4a6"} | ROTATION), sample_tokens=100_000)
    quantize(run)
    source, tokens = open_source(run), {}
    arch = archs.get("qwen2_vl")
    embedder = Embedder(replace(run, output=run.output / "apart"), "qwen2_vl")
    spec = arch.spec(source).blocks[0]
    block = arch.block(source, spec, "cpu", torch.float32)
    block.mlp.down_proj.register_forward_pre_hook(lambda module, args: tokens.setdefault("x", []).append(args[0]))
    for i, sample in enumerate(read_samples(run.calibration)):
        arch.run_block(block, embedder.embed(i, [sample]), 0)
    x = torch.cat([part.flatten(0, 1) for part in tokens["x"]]).double()
    weight = source.get("model.layers.0.mlp.down_proj.weight").double()
    tensors = load_file(run.output / "block-00000.safetensors")
    h = dense(tensors)
    assert h.shape == (96, 96)
    rotated, turned = x @ h, weight @ h
    assert torch.allclose(rotated @ turned.T, x @ weight.T, rtol=0, atol=1e-12 * float((x @ weight.T).abs().max()))
    scale = (turned.abs().amax(dim=1, keepdim=True) / 7.5).bfloat16().double()
    step = rotated.abs().amax(dim=1, keepdim=True) / 31
    product = (rotated / step).round() * step @ ((turned / scale).round().clamp(-8, 7) * scale).T
    error = (product - x @ weight.T).norm() / (x @ weight.T).norm()
    report = read_manifest(run.output).blocks[0].groups["mlp.down"]
    assert report.error == pytest.approx(float(error), rel=1e-3)


def test_rotating_down_at_run_time_takes_its_outliers_off(tied, run):
    """The error of the group where one channel is far larger than the others, with and without."""
    weights = load_file(tied / "model.safetensors")
    loud = {n: t.clone() for n, t in weights.items()}
    for name in loud:
        if name.endswith("up_proj.weight"):
            loud[name][5] *= 100.0
        elif name.endswith("down_proj.weight"):
            loud[name][:, 5] /= 100.0
    folder = run.output.with_name("loud")
    shutil.copytree(tied, folder)
    save_file(loud, folder / "model.safetensors", metadata={"format": "pt"})
    errors = []
    for online in (True, False):
        recipe = recipe_from({"scheme": "w8a4", "rotation": ROTATION["rotation"] | {"online": online}})
        one = replace(run, model=folder, recipe=recipe, output=run.output / str(online))
        quantize(one)
        errors.append(read_manifest(one.output).blocks[0].groups["mlp.down"].error)
    assert errors[0] < 0.6 * errors[1]


def test_transformers_saves_and_loads_it_and_an_older_reader_would_refuse_it(run):
    quantize(run)
    loaded, again = load_model(run.output), run.output / "again"
    wanted = logits(loaded, run.output)
    loaded.save_pretrained(again)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copyfile(run.output / name, again / name)
    saved = json.loads((again / "config.json").read_text())["quantization_config"]
    assert saved["version"] == 3
    assert saved["layouts"][0]["mlp.down"]["input"] == {"rotation_0": ["int8", 12, 12], "rotation_1": ["int8", 8, 8]}
    assert torch.equal(logits(load_model(again), run.output), wanted)
    offline = replace(run, recipe=recipe_from({"scheme": "w8a16", "rotation": {"online": False}}), output=again / "x")
    quantize(offline)
    assert json.loads((again / "x" / "config.json").read_text())["quantization_config"]["version"] == 2


def test_a_rank_has_blocks_of_its_own_where_the_run_was_asked_for_ranks(run):
    refused = (
        "mlp.down: its rotation at run time mixes blocks of 96 inputs, and a rank has 48 of them; quantize for as many "
        "ranks, with --tensor-parallel-size 2, or with rotation.online = false",
    )
    for size, block, problems in ((1, 96, refused), (2, 64, ())):  # for two ranks down is padded to 128 inputs
        one = replace(run, tensor_parallel_size=size, output=run.output / str(size))
        quantize(one)
        checkpoint = Checkpoint.open(one.output)
        assert checkpoint.layout.blocks[0].groups["mlp.down"].rotated_block == block
        assert serving_problems(checkpoint.config, 2) == problems
        assert list(check_ranks(checkpoint, range(1, size + 1))) == []
        assert check_layout(checkpoint) == check_source(checkpoint, run.model) == []


def test_what_stock_engines_cannot_do_is_not_exported(run):
    quantize(replace(run, recipe=recipe_from({"scheme": "w4a16g32"} | ROTATION)))
    with pytest.raises(ConfigError, match=r"mlp\.down cannot be exported: its input is rotated at run time.*online"):
        export(run.output, run.output / "stock", peft=False)
    assert not (run.output / "stock").exists()


def test_a_router_of_the_rotated_input_itself_is_fitted_to_what_it_reads(run):
    content = {
        "scheme": "w4a8", "granularity": "linear", "budget": {"rank": 64},
        "compensation": {"name": "quant_experts", "router": "mean_residual"},
    }  # fmt: skip
    quantize(replace(run, recipe=recipe_from(content | ROTATION)))
    assert 0 < kl(run) < 0.1


def test_from_a_block_on_it_cannot_be_left_out(run):
    quantize(run)
    recipe = recipe_from({"scheme": "w8a16", "rotation": ROTATION["rotation"] | {"online": False}})
    with pytest.raises(ConfigError, match="from block 1 on the model would be rotated differently"):
        quantize(replace(run, recipe=recipe, from_block=1))


def test_another_rotation_is_another_run(run):
    quantize(run)
    for change, said in (
        ({}, r"recipe\.rotation \(\{.*hadamard.*\} then, None now\)"),
        ({"rotation": {"name": "hadamard", "seed": 2, "ranks": 1}}, r"recipe\.rotation\.seed \(1 then, 2 now\)"),
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
