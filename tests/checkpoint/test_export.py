"""`qe-dist export`: what is written for other engines says what ours says; what it cannot say is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from qe_pipelines import main
from safetensors.torch import load_file, save_file

from qe_dist import archs
from qe_dist.checkpoint.compressed_tensors import LinearFormat
from qe_dist.checkpoint.export import ADAPTER, CARD, REPORT, export
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.layout import GroupLayout, TensorSpec
from qe_dist.core.scheme import Scheme
from qe_dist.data.samples import load_images, read_samples
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.io.checkpoint import INDEX, MANIFEST
from qe_dist.io.publish import sha256
from qe_dist.methods.recipes import load_recipe
from qe_dist.numerics.grid import dequantize
from qe_dist.numerics.packing import unpack
from qe_dist.serve.loading import load_model
from tests.tiny import DATA, calibration, tiny_model

RECIPES = (
    "rtn-w4a16g32", "rtn-w3a16g32", "rtn-w4a8", "lqer-w4a6", "awq-w4a16g32", "smoothquant-w4a8", "aser-w4a16g32",
    "serq-w4a16g32", "qera-w4a16g32", "qe-paper-w4a16g32", "masquant-w4a8", "rtn-w4a16g8",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Recipe -> checkpoint, all in one pass."""
    root = tmp_path_factory.mktemp("made")
    model, data = tiny_model(root / "model"), calibration(root / "data", 4)
    runs = {
        name: RunConfig(model, load_recipe(name), data, root / name, samples_per_batch=2, sample_tokens=64)
        for name in RECIPES
    }
    quantize(*runs.values())
    return {name: run.output for name, run in runs.items()}


@pytest.fixture
def changed(made, tmp_path):
    """changed(recipe, edit): a copy whose blocks' tensors went through edit, the manifest true to it."""

    def change(recipe, edit):
        folder = shutil.copytree(made[recipe], tmp_path / "changed", ignore=shutil.ignore_patterns(".run"))
        manifest = json.loads((folder / MANIFEST).read_text())
        for path in folder.glob("block-*.safetensors"):
            save_file({name: edit(name, tensor) for name, tensor in load_file(path).items()}, path)
            manifest["files"][path.name] = sha256(path)
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return folder

    return change


def blocks(folder):
    return {n: t for path in sorted(folder.glob("block-*.safetensors")) for n, t in load_file(path).items()}


def modules(tensors, last):
    return [name.removesuffix(f".{last}") for name in tensors if name.endswith(f".{last}")]


def dense(tensors, linear, bits):
    """By compressed-tensors' own unpacking, in float64."""
    shape = torch.Size(tensors[f"{linear}.weight_shape"].tolist())
    codes = unpack_from_int32(tensors[f"{linear}.weight_packed"], bits, shape)
    return dequantize(codes, tensors[f"{linear}.weight_scale"], torch.float64)


def ours(tensors, linear, bits):
    codes = unpack(tensors[f"{linear}.weight_packed"], bits, int(tensors[f"{linear}.weight_shape"][1]))
    return dequantize(codes, tensors[f"{linear}.weight_scale"], torch.float64)


@torch.no_grad()
def logits(folder, model=None):
    """Of the folder's model, which transformers loads: our checkpoints by our plug-in, exports without it."""
    model = load_model(folder) if model is None else model
    config = json.loads((folder / "config.json").read_text())
    arch = archs.for_checkpoint(config)
    encoder = arch.encoder(folder)
    samples = [s for i, s in enumerate(read_samples(DATA / "evaluation.jsonl")) if i in (0, 6)]
    inputs = arch.model_inputs([encoder(s, load_images(s)) for s in samples], pad=0)
    return model(**inputs, use_cache=False).logits


def with_lora(model, folder):
    """y += (x A^T) B^T times alpha / r, as PEFT and vLLM do. The model has run: until then its weights are packed."""
    told = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    linears = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    for linear in linears:
        down, up = (tensors[f"{linear}.lora_{x}.weight"].float() for x in "AB")
        assert down.shape[0] == up.shape[1] == told["r"]
        module = linear.removeprefix("base_model.model.")
        assert re.fullmatch(told["target_modules"], module)
        weight = model.get_submodule(module).weight
        weight.data += told["lora_alpha"] / told["r"] * up @ down
    return model


def close(a, b, by=1e-4):
    return float((a - b).abs().max() / b.abs().max()) < by


@pytest.mark.parametrize(("recipe", "bits"), [("rtn-w4a16g32", 4), ("rtn-w3a16g32", 3), ("rtn-w4a8", 4)])
def test_weights_are_codes_times_scales_to_the_last_bit(made, tmp_path, recipe, bits):
    export(made[recipe], tmp_path / "out", peft=False)
    source, stock = blocks(made[recipe]), blocks(tmp_path / "out")
    assert stock.keys() == source.keys()  # no module of ours is left, and RTN had none
    linears = modules(stock, "weight_packed")
    assert len(linears) == 14
    for linear in linears:
        assert torch.equal(dense(stock, linear, 4), ours(source, linear, bits))


def test_the_config_is_what_compressed_tensors_reads(made, tmp_path):
    export(made["smoothquant-w4a8"], tmp_path / "out", peft=False)
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    read = QuantizationConfig.model_validate(told)
    scheme = read.config_groups["group_0"]
    assert (scheme.weights.num_bits, scheme.weights.strategy, scheme.weights.symmetric) == (4, "channel", True)
    inputs = scheme.input_activations
    assert (inputs.num_bits, inputs.strategy, inputs.dynamic) == (8, "token", True)
    whole = {"config": json.loads((made["rtn-w4a8"] / "config.json").read_text())}
    del whole["config"]["quantization_config"]
    rest = json.loads((tmp_path / "out" / "config.json").read_text())
    del rest["quantization_config"]
    assert rest == whole["config"]


@pytest.mark.parametrize("recipe", ["rtn-w4a16g32", "rtn-w3a16g32"])
def test_transformers_computes_what_our_checkpoint_does(made, tmp_path, recipe):
    export(made[recipe], tmp_path / "out", peft=False)
    assert close(logits(tmp_path / "out"), logits(made[recipe]))


@pytest.mark.parametrize("agree", [True, False])
def test_the_scale_of_the_input_goes_into_what_is_before_it(changed, tmp_path, agree):
    """Powers of two, so that nothing is rounded. o stays in 4 bits only where heads that share keys agree."""

    def power(name, tensor):
        if name.endswith(".bias"):  # of a new model they are zero
            return torch.ones_like(tensor)
        if not name.endswith("input_scale"):
            return tensor
        exponents = torch.randint(-2, 3, tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()))
        if agree and ".o_input" in name:  # 4 heads of 16, two to a head of keys
            exponents = exponents.view(2, 2, 16)[:, :1].expand(2, 2, 16).reshape(tensor.shape)
        return torch.exp2(exponents).to(tensor.dtype)

    folder = changed("awq-w4a16g32", power)
    exported = export(folder, tmp_path / "out", peft=False)
    stock = blocks(tmp_path / "out")
    assert not any("_input." in name for name in stock)
    assert {m.rpartition(".")[2] for m in modules(stock, "weight")} >= {"o_proj"} or agree
    assert ("model.layers.0.self_attn.o_proj.weight_packed" in stock) == agree
    assert any("16 bits" in what for what in exported.changed) != agree
    assert close(logits(tmp_path / "out"), logits(folder), by=1e-4 if agree else 0.02)  # o is rounded to bf16


def test_without_folding_the_same_test_would_fail(changed, tmp_path):
    folder = changed("awq-w4a16g32", lambda n, t: 4 * torch.ones_like(t) if n.endswith("input_scale") else t)
    export(folder, tmp_path / "out", peft=False)
    unscaled = tmp_path / "out"
    for path in unscaled.glob("block-*.safetensors"):
        tensors = load_file(path)
        save_file({n: 4 * t if n.endswith("input_layernorm.weight") else t for n, t in tensors.items()}, path)
    assert not close(logits(unscaled), logits(folder), by=1e-2)


@pytest.mark.parametrize("recipe", ["aser-w4a16g32", "serq-w4a16g32", "qera-w4a16g32"])
def test_the_lora_is_the_static_repair(made, tmp_path, recipe):
    """Adapters, columns taken from the codes, and salient columns; factors and folded scales are rounded to bf16."""
    exported = export(made[recipe], tmp_path / "out", peft=True)
    whole = logits(made[recipe])
    base = load_model(tmp_path / "out")
    bare = logits(tmp_path / "out", base)
    repaired = logits(tmp_path / "out", with_lora(base, tmp_path / "out" / ADAPTER))
    assert (repaired - whole).norm() < 0.03 * (bare - whole).norm()
    assert exported.notes[0].startswith("LOST without the LoRA")
    assert sorted(p.name for p in (tmp_path / "out" / ADAPTER).iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_the_lora_reads_the_input_unrounded_whatever_the_recipe_rounds(made, tmp_path):
    """Ours with activations in 16 bits, which is what the export declares."""
    export(made["lqer-w4a6"], tmp_path / "out", peft=True)
    unrounded = shutil.copytree(
        made["lqer-w4a6"], tmp_path / "unrounded", ignore=shutil.ignore_patterns(".run", MANIFEST)
    )
    config = unrounded / "config.json"
    config.write_text(config.read_text().replace('"w4a6"', '"w4a16"'))
    base = load_model(tmp_path / "out")
    logits(tmp_path / "out", base)
    assert close(logits(tmp_path / "out", with_lora(base, tmp_path / "out" / ADAPTER)), logits(unrounded), by=0.01)


def test_groups_of_scales_become_those_that_kernels_have():
    def of(scheme, **specs):
        return LinearFormat.of(GroupLayout(Scheme.parse(scheme), "fc", specs, {}))

    assert of("w4a16g256") == LinearFormat(4, 128, None)
    assert of("w2a16g96") == LinearFormat(4, 32, None)
    assert of("w6a16") == LinearFormat(8, None, None)
    assert of("w4a8") == LinearFormat(4, None, 8)
    assert (
        of("w4a8k64")
        == of("w4a6")
        == of("w4a8", lr_expert_channels=TensorSpec("int32", (2, 4)))
        == LinearFormat(4, None, None)
    )


def test_what_is_lost_is_said_to_people_and_to_machines(made, tmp_path, monkeypatch, capsys):
    words = ["qe-dist", "export", str(made["lqer-w4a6"]), "--output", str(tmp_path / "out"), "--base-only"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 0
    said = capsys.readouterr().err
    card = (tmp_path / "out" / CARD).read_text()
    told = json.loads((tmp_path / "out" / REPORT).read_text())
    for what in ("the shared low-rank branch", "the speed of 6-bit activations"):
        assert what in said
        assert what in card
        assert any(what in lost for lost in told["lost"])
    assert told["recipe"]["scheme"] == str(Scheme.parse("w4a6"))
    assert all(sha256(tmp_path / "out" / name) == expected for name, expected in told["files"].items())


def test_index_and_files_agree_and_keep_their_names(made, tmp_path):
    export(made["qera-w4a16g32"], tmp_path / "out", peft=True)
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    held = {n: p.name for p in (tmp_path / "out").glob("*.safetensors") for n in load_file(p)}
    assert index == held
    assert {p.name for p in made["qera-w4a16g32"].glob("*.safetensors")} == set(held.values())


@pytest.mark.parametrize(
    ("recipe", "peft", "said"),
    [
        ("masquant-w4a8", False, r"layers\.0\.self_attn\.qkv .*treats text and image tokens differently"),
        ("qe-paper-w4a16g32", True, r"layers\.0\.self_attn\.qkv .*routed experts.*--base-only"),
        ("rtn-w4a16g32", True, "no repair that could become a LoRA; export with --base-only"),
        ("aser-w4a16g32", False, r"layers\.0\.self_attn\.qkv: .* of its 64 input channels.*--peft"),
        ("qe-paper-w4a16g32", False, r"layers\.0\.self_attn\.qkv: .* of its 64 input channels"),
        ("serq-w4a16g32", False, r"layers\.0\.self_attn\.qkv .*beside the codes.*--peft"),
        ("rtn-w4a16g8", False, r"layers\.0\.self_attn\.qkv .*every 8 inputs.*32, 64 or 128"),
    ],
)
def test_what_stock_engines_cannot_do_is_refused_by_name(made, tmp_path, recipe, peft, said):
    with pytest.raises(ConfigError, match=said):
        export(made[recipe], tmp_path / "out", peft)
    assert list(tmp_path.iterdir()) == []


def test_scales_of_single_linears_that_differ_are_refused(tmp_path):
    recipe = tmp_path / "single.toml"
    recipe.write_text('scheme = "w4a16g32"\ngranularity = "linear"\n[transform]\nname = "smoothquant"\n')
    run = RunConfig(
        tiny_model(tmp_path / "model"), load_recipe(str(recipe)), calibration(tmp_path / "data", 4), tmp_path / "made",
        samples_per_batch=2, sample_tokens=64,
    )  # fmt: skip
    quantize(run)
    with pytest.raises(ConfigError, match=r"self_attn\.k_proj and .*self_attn\.q_proj want different scales"):
        export(run.output, tmp_path / "out", peft=False)


def test_a_damaged_file_ends_it_and_nothing_is_left(made, tmp_path):
    folder = shutil.copytree(made["rtn-w4a8"], tmp_path / "damaged", ignore=shutil.ignore_patterns(".run"))
    path = folder / "block-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"block-00001\.safetensors is missing or not what the manifest says"):
        export(folder, tmp_path / "out", peft=False)
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


def test_an_output_that_exists_is_left_alone(made, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ConfigError, match=f"{tmp_path} exists"):
        export(made["rtn-w4a8"], tmp_path, peft=False)
    assert (tmp_path / "kept").read_text() == "mine"


def test_the_commands_of_the_page_run(made, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "guides" / "serving.md").read_text()
    commands = re.findall(r"^    (qe-dist export .*)$", page, re.MULTILINE)
    assert [command.split()[3] for command in commands] == ["--base-only", "--peft"]
    for number, command in enumerate(commands):
        output = tmp_path / str(number)
        names = {"CHECKPOINT": str(made["qera-w4a16g32"]), "STOCK": str(output)}
        monkeypatch.setattr("sys.argv", [names.get(word, word) for word in command.split()])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == 0
        assert (output / "config.json").exists()
    assert (output / ADAPTER / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("flags", [[], ["--base-only", "--peft"]])
def test_one_kind_of_export_is_asked_for(made, tmp_path, monkeypatch, capsys, flags):
    words = ["qe-dist", "export", str(made["rtn-w4a8"]), "--output", str(tmp_path / "out"), *flags]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert "give either --base-only or --peft" in capsys.readouterr().err
