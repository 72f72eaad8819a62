"""The whole pipeline in one process on a tiny model."""

import json
from dataclasses import replace

import pytest
import torch

from qe_dist import archs
from qe_dist.checkpoint.evaluate import evaluate, save_reference
from qe_dist.core.batch import Batch, held_out_below, sample_keys
from qe_dist.core.errors import ConfigError
from qe_dist.data.samples import load_images, read_samples
from qe_dist.flow.calibrate import Embedder
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import prepare_run, quantize
from qe_dist.flow.plan import FitJob, StagePlan
from qe_dist.flow.stage import Stage
from qe_dist.io.checkpoint import read_manifest
from qe_dist.io.publish import sha256
from qe_dist.methods.recipes import RECIPES, load_recipe
from qe_dist.methods.rotations.hadamard import Hadamard
from tests.gate import in_gate
from tests.tiny import DATA, calibration, tiny_model

RECIPE = "smoothquant+lists+gptq+qera-w4a6@0.5f4"
"""With something on every axis but a rotation, which test_rotation.py has."""
TOO_NARROW = {"qe-w4a8": "qe-w4a8@0.5"}
"""A list of one of 64 channels leaves nothing of a quarter of a bit."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(model, tmp_path):
    data = calibration(tmp_path / "data")
    return RunConfig(model, load_recipe(RECIPE), data, tmp_path / "out", samples_per_batch=3, sample_tokens=256)


def load(folder, dtype=torch.float32):
    from transformers import AutoModelForImageTextToText

    import qe_dist  # noqa: F401

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def encoded(model):
    arch = archs.get("qwen2_vl")
    encoder = arch.encoder(model)
    samples = read_samples(DATA / "evaluation.jsonl")
    return arch, [encoder(s, load_images(s)) for s in (*samples[:4], samples[-1])]


GATE = ("rtn-w4a8", "awq-w4a8", "masquant-w4a6", "qe-w4a6", "qe-extract-w4a6", "serq-w4a8")
"""One of every kind of linear that a loaded model may have."""


@pytest.mark.parametrize("name", in_gate(GATE, [n for n in RECIPES if n.endswith(("w4a6", "w4a8"))]))
def test_every_kind_of_recipe_gives_a_checkpoint_that_loads_and_answers(run, name):
    quantize(replace(run, recipe=load_recipe(TOO_NARROW.get(name, name))))
    quantized, source = load(run.output), load(run.model)
    arch, examples = encoded(run.model)
    kl = evaluate(
        quantized, arch, examples, save_reference(source, arch, examples, run.output.with_name("reference"))
    ).summary()["kl"]
    assert 0 < kl < 0.5
    out = quantized.generate(input_ids=examples[-1].input_ids[None, :8], max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 12)


def test_w8a16_is_nearly_the_source(run):
    from qe_dist.methods.recipes import recipe_from

    quantize(replace(run, recipe=recipe_from({"scheme": "w8a16"})))
    arch, examples = encoded(run.model)
    full = save_reference(load(run.model), arch, examples, run.output.with_name("reference"))
    assert evaluate(load(run.output), arch, examples, full).summary()["kl"] < 1e-3


def test_group_and_linear_granularity_and_integer_factors_and_extraction_load(run):
    from qe_dist.methods.recipes import recipe_from

    for i, extra in enumerate(
        (
            {"granularity": "linear"},
            {"budget": {"rank": 64, "factor_bits": 8}},
            {"budget": {"rank": 64, "factor_bits": 4}},
            {"compensation": {"name": "quant_experts", "extract": True}},
            {"transform": {"name": "smoothquant"}},
            {"scheme": "w3a16g32"},
        )
    ):
        recipe = {"scheme": "w4a8", "compensation": {"name": "quant_experts", "num_experts": 3}} | extra
        one = replace(run, recipe=recipe_from(recipe), output=run.output / str(i))
        quantize(one)
        arch, examples = encoded(run.model)
        full = save_reference(load(run.model), arch, examples, run.output.with_name("reference"))
        assert evaluate(load(one.output), arch, examples, full).summary()["kl"] < 0.5


def test_routers_on_their_own_input_share_the_pass_with_others_and_are_what_they_are_alone(run):
    """The router of down is as wide as what down reads, and the loaded model routes on it."""
    from qe_dist.methods.recipes import recipe_from

    def routing_on(router_input, folder):
        compensation = {"name": "quant_experts", "num_experts": 3, "router_input": router_input}
        recipe = recipe_from({"scheme": "w4a8", "compensation": compensation})
        return replace(run, recipe=recipe, output=run.output / folder)

    own, sublayer, alone = routing_on("own", "own"), routing_on("sublayer", "sublayer"), routing_on("own", "alone")
    quantize(sublayer, own)
    quantize(alone)
    arch, examples = encoded(run.model)
    full = save_reference(load(run.model), arch, examples, run.output.with_name("reference"))
    for one, width in ((own, 96), (sublayer, 64)):
        quantized = load(one.output)
        assert quantized.get_decoder().layers[0].mlp.down_input.router.shape == (3, width)
        assert evaluate(quantized, arch, examples, full).summary()["kl"] < 0.5
    assert files(own.output)["block-00001.safetensors"] == files(alone.output)["block-00001.safetensors"]
    assert read_manifest(own.output).blocks[1].groups["mlp.down"].error < 1


def test_a_router_on_its_own_input_reads_it_before_it_is_rotated(run):
    """As one of a group that is a single linear, which needs no statistics of another group."""
    recipe = replace(load_recipe("qe-paper-w4a8"), rotation=Hadamard())
    own = replace(recipe, compensation=replace(recipe.compensation, router_input="own"))
    both = [
        replace(run, recipe=own, output=run.output / "own"),
        replace(run, recipe=replace(recipe, granularity="linear"), output=run.output / "linear"),
    ]
    ready = prepare_run(*both)
    embedder, stage = Embedder(both[0], ready.model.arch), Stage(both, ready.model.arch)
    stage.load(StagePlan(0, ready.model.blocks[:1]))
    for i, samples in enumerate(ready.samples):
        stage.forward(embedder.embed(i, samples))
    group, linear = (stage.problem(FitJob(i, 0, n)).stats for i, n in enumerate(("mlp.down", "mlp.down_proj")))
    assert torch.equal(group.sample.x, linear.sample.x)
    assert not torch.allclose(group.sample.x, group.sample.router_x, rtol=0.1)
    assert torch.allclose(group.sample.router_x, linear.sample.router_x, rtol=1e-4, atol=1e-5)


def test_the_report_of_a_group_is_what_its_module_does(run):
    """The error that the manifest states, measured again with the loaded modules on the model's own inputs."""
    quantize(run)
    quantized, source = load(run.output), load(run.model)
    caught = {}
    layers = source.get_decoder().layers
    layers[1].mlp.gate_proj.register_forward_hook(lambda m, a, y: caught.update(x=a[0], y=y))
    arch = archs.get("qwen2_vl")
    encoder = arch.encoder(run.model)
    wrong = right = 0.0
    for sample in read_samples(run.calibration):
        inputs = arch.model_inputs([encoder(sample, load_images(sample))], pad=0)
        with torch.no_grad():
            source(**inputs, use_cache=False)
            y = quantized.get_decoder().layers[1].mlp.gate_proj(caught["x"])
        wrong += (y - caught["y"]).square().sum().item()
        right += caught["y"].square().sum().item()
    stated = read_manifest(run.output).blocks[1].groups["mlp.gate_up"].error
    assert (wrong / right) ** 0.5 == pytest.approx(stated, rel=0.3)  # gate alone, stated for gate and up


def test_save_and_load_round_trip_keeps_names_and_logits(run, tmp_path):
    from safetensors import safe_open

    quantize(run)
    first = load(run.output, torch.bfloat16)
    first.save_pretrained(tmp_path / "again")
    second = load(tmp_path / "again", torch.bfloat16)
    before, after = first.state_dict(), second.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    written = set(json.loads((run.output / "model.safetensors.index.json").read_text())["weight_map"])
    with safe_open(tmp_path / "again" / "model.safetensors", framework="pt") as again:
        assert set(again.keys()) == written
    ids = torch.arange(7, 20)[None]
    assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)


def test_manifest_names_every_file_by_its_hash_and_counts_all_bytes(run):
    quantize(run)
    manifest = read_manifest(run.output)
    for name, digest in manifest.files.items():
        assert sha256(run.output / name) == digest
    assert manifest.fallbacks == {}
    assert manifest.arithmetic == run.recipe.scheme.arithmetic
    assert manifest.checkpoint_bytes == sum(p.stat().st_size for p in run.output.iterdir() if p.is_file())
    assert manifest.parameters == sum(p.numel() for p in load(run.model).parameters())
    macs = manifest.macs_by_arithmetic
    assert macs["int8"] == 1
    assert 0 < macs["a16"] == pytest.approx(manifest.macs_per_weight - 1)
    assert manifest.bits_per_weight > 4
    assert not (run.output / ".run" / "activations").exists()


def test_waves_give_the_same_bytes(run, tmp_path):
    quantize(run)
    waved = replace(run, output=tmp_path / "waves", blocks_per_worker=1)
    quantize(waved)
    assert files(waved.output) == files(run.output)


def test_an_interrupted_run_continues_and_gives_the_same_bytes(run, tmp_path, monkeypatch):
    from qe_dist.flow.stage import Stage

    quantize(run)
    broken = replace(run, output=tmp_path / "broken")
    fit, fitted = Stage.fit, []

    def failing(self, index):
        if index == 1:
            raise KeyboardInterrupt
        fitted.append(index)
        return fit(self, index)

    monkeypatch.setattr(Stage, "fit", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize(broken)
    assert not (broken.output / "config.json").exists()
    before = (broken.output / ".run" / "blocks" / "block-00000.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(Stage, "fit", fit)
    quantize(replace(broken, resume="required"))
    assert files(broken.output) == files(run.output)
    assert (broken.output / "block-00000.safetensors").stat().st_mtime_ns == before


def test_a_directory_of_another_run_is_refused_with_the_difference(run):
    quantize(run)
    with pytest.raises(ConfigError, match=r"belongs to another run.*recipe\.scheme \('w4a6' then, 'w4a4' now\)"):
        quantize(replace(run, recipe=load_recipe(RECIPE.replace("w4a6", "w4a4"))))
    with pytest.raises(ConfigError, match="resume=never"):
        quantize(replace(run, resume="never"))
    quantize(run)  # the same again: nothing to do


def test_required_needs_a_run_and_foreign_folders_are_left_alone(run):
    with pytest.raises(ConfigError, match="no run to continue"):
        quantize(replace(run, resume="required"))
    theirs = run.output.parent / "theirs"
    theirs.mkdir()
    (theirs / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a run of ours"):
        quantize(replace(run, output=theirs))
    assert [p.name for p in theirs.iterdir()] == ["precious.txt"]


def test_infinite_activations_are_named_left_out_and_written_to_the_manifest(run, tmp_path):
    """Block 1's norm overflows float32 for every token: its groups climb down to RTN, and say so."""
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path / "hot")
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.1.input_layernorm.weight"))
    weights[name][:] = 3e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    quantize(replace(run, model=folder))
    fallbacks = read_manifest(run.output).fallbacks
    assert not any("layers.0" in layer for layer in fallbacks)
    steps = fallbacks[name.replace("input_layernorm.weight", "self_attn.qkv")]
    assert "have a NaN or Inf at this input" in steps[0]
    assert "RTN" in steps[-1]
    from safetensors import safe_open

    for file in run.output.glob("block-*.safetensors"):
        with safe_open(file, framework="pt") as block:
            for tensor in (block.get_tensor(k) for k in block.keys()):  # noqa: SIM118
                assert not tensor.is_floating_point() or torch.isfinite(tensor).all()


def test_one_pass_of_the_calibration_serves_many_recipes_with_the_bytes_of_each_alone(run, tmp_path, monkeypatch):
    recipes = [
        load_recipe(RECIPE),
        load_recipe("aser-w4a8"),
        replace(load_recipe("qera-w4a4"), granularity="linear"),
    ]
    alone = [replace(run, recipe=r, output=tmp_path / f"alone-{i}") for i, r in enumerate(recipes)]
    together = [replace(run, recipe=r, output=tmp_path / f"together-{i}") for i, r in enumerate(recipes)]
    for one in alone:
        quantize(one)
    passes = []
    forward = Stage.forward
    monkeypatch.setattr(Stage, "forward", lambda stage, batch: (passes.append(batch.index), forward(stage, batch))[1])
    quantize(*together)
    assert passes == sorted(set(passes))
    for a, b in zip(alone, together, strict=True):
        assert files(a.output) == files(b.output)
    quantize(*together, replace(run, recipe=load_recipe("rtn-w4a8"), output=tmp_path / "later"))  # one more is added
    assert (tmp_path / "later" / "config.json").exists()


def test_from_a_block_on_another_recipe_may_hold(run, tmp_path):
    old, new = load_recipe("rtn-w4a8"), load_recipe("qera-w3a16g32")
    quantize(replace(run, recipe=old))
    quantize(replace(run, recipe=new, output=tmp_path / "new"))
    before = files(run.output)
    changed = replace(run, recipe=new, from_block=1)
    with pytest.raises(ConfigError, match=r"differs in .*recipe"):
        quantize(replace(run, recipe=new))
    with pytest.raises(ConfigError, match=r"differs in .*seed \(0 then, 1 now\)"):
        quantize(replace(changed, seed=1))
    assert files(run.output) == before
    quantize(changed)
    after, other = files(run.output), files(tmp_path / "new")
    assert after["block-00000.safetensors"] == before["block-00000.safetensors"]
    assert after["block-00001.safetensors"] == other["block-00001.safetensors"]
    manifest = read_manifest(run.output)
    assert [block.recipe_from for block in manifest.blocks] == [0, 1]
    assert manifest.arithmetic == "a16 and int8"
    executed = [{group.arithmetic for group in block.groups.values()} for block in manifest.blocks]
    assert executed == [{"int8"}, {"a16"}]
    assert manifest.run["earlier"] == [[0, old.describe()]]
    arch, examples = encoded(run.model)
    full = save_reference(load(run.model), arch, examples, run.output.with_name("reference"))
    assert evaluate(load(run.output), arch, examples, full).summary()["kl"] < 0.5
    quantize(changed)  # the same again: nothing to do
    assert files(run.output) == after


def test_from_a_block_on_needs_a_run_and_a_block_that_exists(run):
    with pytest.raises(ConfigError, match="holds no run; a recipe can be changed"):
        quantize(replace(run, from_block=1))
    quantize(run)
    with pytest.raises(ConfigError, match="from_block is 2, but the model ends with block 1"):
        quantize(replace(run, from_block=2))


def test_every_wave_but_the_last_leaves_the_input_of_the_next(run, monkeypatch):
    left = []

    def finish(self, batch, next_block):
        left.append(next_block)
        return plain(self, batch, next_block)

    plain = Stage.finish
    monkeypatch.setattr(Stage, "finish", finish)
    quantize(replace(run, blocks_per_worker=1))
    assert left == [1, 1, None, None]  # of two batches in two waves


def test_a_wave_that_is_streamed_again_counts_no_batch_twice(run, same):
    ready = prepare_run(run)
    embedder = Embedder(run, ready.model.arch)
    once, again = Stage((run,), ready.model.arch), Stage((run,), ready.model.arch)
    batches = [embedder.embed(i, samples) for i, samples in enumerate(ready.samples)]
    for stage in (once, again):
        stage.load(StagePlan(0, ready.model.blocks))
    for batch in batches:
        expected = once.forward(batch)
    for batch in (batches[0], *batches):
        found = again.forward(batch)
    assert torch.equal(found.hidden, expected.hidden)
    for index, block in once.blocks.items():
        assert same(block.stats, again.blocks[index].stats)
    with pytest.raises(LookupError, match="batch 7 came before batch 2"):
        again.forward(replace(batches[0], index=7))


def test_a_batch_moves_to_the_device_once_and_every_block_finds_it_there(run, monkeypatch):
    ready = prepare_run(run)
    stage = Stage((run,), ready.model.arch)
    stage.load(StagePlan(0, ready.model.blocks))
    batch = Embedder(run, ready.model.arch).embed(0, ready.samples[0])
    moves, seen, move, run_block = [], [], Batch.to, type(stage.arch).run_block

    def moved(batch, device):
        """As to another device: every tensor is a new one."""
        moves.append(device)
        copies = {name: tensor.clone() for name, tensor in batch.tensors().items()}
        return move(Batch.from_tensors(copies), device)

    def spied(arch, block, batch, index):
        seen.append([batch.modality, batch.sample_ids, *batch.context.values()])
        return run_block(arch, block, batch, index)

    monkeypatch.setattr(Batch, "to", moved)
    monkeypatch.setattr(type(stage.arch), "run_block", spied)
    stage.forward(batch)
    assert moves == [run.device, "cpu"]
    first, second = seen
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert not {id(t) for t in first} & {id(t) for t in (batch.modality, *batch.context.values())}
    moves.clear()
    stage.forward(batch, stay=True)
    assert moves == [run.device]


@pytest.fixture
def sixteen(run, tmp_path):
    """Of which one is held out."""
    return replace(run, calibration=calibration(tmp_path / "sixteen", 16), output=tmp_path / "of-sixteen")


def test_what_is_held_out_changes_nothing_but_what_is_said_of_it(sixteen, tmp_path):
    """The block that is fitted is that of the other fifteen samples."""
    quantize(sixteen)
    ready = prepare_run(sixteen)
    seen = [s for batch in ready.samples for s in batch if sample_keys(torch.tensor([s.index])) >= held_out_below(16)]
    assert len(seen) == 15
    stage, alone = (Stage((replace(sixteen, output=tmp_path / n),), ready.model.arch) for n in ("a", "b"))
    embedder = Embedder(replace(sixteen, output=tmp_path / "c"), ready.model.arch)
    for one, below in ((stage, held_out_below(16)), (alone, 0)):
        one.load(StagePlan(0, ready.model.blocks[:1], held_out_below=below))
    for i, samples in enumerate(ready.samples):
        stage.forward(embedder.embed(i, samples))
        alone.forward(embedder.embed(i, [s for s in samples if s in seen]))
    for name, stats in stage.blocks[0].stats.items():
        other = alone.blocks[0].stats[name]
        assert torch.equal(stats.count, other.count)
        assert torch.equal(stats.sample.keys, other.sample.keys)
        assert torch.allclose(stats.gram, other.gram, rtol=1e-4, atol=1e-4 * float(other.gram.abs().max()))
        assert len(stats.held_out.keys) == 32 > len(other.held_out.keys) == 0


def test_errors_on_held_out_sequences_are_reported_beside_those_on_the_sample(sixteen, run, tmp_path):
    quantize(sixteen)
    waved = replace(sixteen, output=tmp_path / "waves", blocks_per_worker=1, samples_per_batch=3)
    quantize(waved)
    assert files(waved.output) == files(sixteen.output)
    for block in read_manifest(sixteen.output).blocks:
        for group in block.groups.values():
            assert 0 < group.held_out_error < 1
            assert set(group.held_out_error_by_modality) <= {"text", "image"} != set()
            assert group.held_out_error != group.error
    quantize(run)
    groups = [group for block in read_manifest(run.output).blocks for group in block.groups.values()]
    assert {group.held_out_error for group in groups} == {None}
    assert all(group.held_out_error_by_modality == {} for group in groups)


def test_runs_that_differ_in_more_than_the_recipe_share_nothing(run, tmp_path):
    with pytest.raises(ConfigError, match="differ in more than their recipe"):
        quantize(run, replace(run, output=tmp_path / "other", seed=1))
    with pytest.raises(ConfigError, match="output directory of its own"):
        quantize(run, replace(run, recipe=load_recipe("rtn-w4a8")))
