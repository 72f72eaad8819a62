"""`qe-dist verify` sees every kind of damage and names it; a sound checkpoint has no fault."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qe_dist import archs
from qe_dist.checkpoint import verify
from qe_dist.checkpoint.verify import (
    Checkpoint,
    check_finite,
    check_hashes,
    check_index,
    check_layout,
    check_source,
    image_effect,
)
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.io.checkpoint import INDEX, MANIFEST
from qe_dist.io.publish import sha256
from qe_dist.methods.recipes import load_recipe, recipe_from
from qe_dist.serve.loading import load_model
from tests.tiny import calibration, stories, tiny_model

FILE_CHECKS = (check_hashes, check_index, check_finite, check_layout)
BLOCK = "block-00001.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A model and the checkpoint made of it."""
    root = tmp_path_factory.mktemp("sound")
    run = RunConfig(
        tiny_model(root / "model"), load_recipe("qe-w4a6"), calibration(root / "data", 4), root / "out",
        samples_per_batch=2, sample_tokens=64,
    )  # fmt: skip
    quantize(run)
    return run


@pytest.fixture
def folder(sound, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sound.output, tmp_path / "out", ignore=shutil.ignore_patterns(".run"))


def change(folder, file, edit):
    """Rewrites the tensors of a file; the hash in the manifest no longer holds."""
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def linear(folder, name="mlp.up_proj", tensor="weight_packed"):
    return json.loads((folder / MANIFEST).read_text())["blocks"][1]["prefix"] + f"{name}.{tensor}"


def test_a_sound_checkpoint_has_no_fault(sound, folder):
    checkpoint = Checkpoint.open(folder)
    assert [check(checkpoint) for check in FILE_CHECKS] == [[], [], [], []]
    assert check_source(checkpoint, sound.model) == []


@pytest.mark.parametrize("extra", [{"granularity": "linear"}, {"rotation": {"name": "hadamard"}}])
def test_other_granularities_and_rotated_models_are_sound_too(sound, tmp_path, extra):
    run = replace(sound, recipe=recipe_from({"scheme": "w4a8"} | extra), output=tmp_path / "out")
    quantize(run)
    checkpoint = Checkpoint.open(run.output)
    assert [check(checkpoint) for check in FILE_CHECKS] == [[], [], [], []]
    assert check_source(checkpoint, run.model) == []


def test_a_changed_byte_is_named_with_both_hashes(folder):
    path = folder / BLOCK
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (fault,) = check_hashes(Checkpoint.open(folder))
    assert fault.startswith(f"{BLOCK}: SHA-256 expected ")
    assert fault.count("found") == 1


@pytest.mark.filterwarnings("ignore")
def test_a_changed_byte_is_not_loaded_and_its_tensor_named(folder):
    name = linear(folder)
    change(folder, BLOCK, lambda tensors: tensors[name].view(-1)[7:8].bitwise_xor_(1))
    with pytest.raises(CheckpointError, match=rf"{BLOCK}: SHA-256 .* \({name} is not as written\); copy it again"):
        load_model(folder)


def test_settings_of_another_checkpoint_are_named(folder):
    edit_json(folder / "config.json", lambda config: config["quantization_config"]["block_layouts"].reverse())
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(version=3))
    assert check_hashes(Checkpoint.open(folder)) == ["config.json: its quantization_config is not that of the manifest"]


def test_missing_and_foreign_files_are_named(folder):
    (folder / BLOCK).rename(folder / "model.safetensors")
    faults = check_hashes(Checkpoint.open(folder))
    assert faults == [f"{BLOCK}: missing", "model.safetensors: not in the manifest"]


def test_a_truncated_file_is_named_once_by_each_check_that_reads_it(folder):
    (folder / BLOCK).write_bytes((folder / BLOCK).read_bytes()[:-8])
    checkpoint = Checkpoint.open(folder)
    assert len(check_hashes(checkpoint)) == 1
    (fault,) = check_index(checkpoint)
    assert fault.startswith(f"{BLOCK}: cannot be read: ")
    assert check_finite(checkpoint) == []


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_number_that_is_none_is_named_by_tensor_and_file(folder, value):
    name = linear(folder, tensor="weight_scale")
    change(folder, BLOCK, lambda t: t[name].view(-1).__setitem__(-1, value))
    assert check_finite(Checkpoint.open(folder)) == [f"{name}: NaN or Inf in {BLOCK}"]


def test_numbers_are_looked_at_in_every_slice(folder, monkeypatch):
    monkeypatch.setattr(verify, "SLICE_BYTES", 64)
    name = linear(folder, tensor="weight_scale")
    change(folder, BLOCK, lambda t: t[name].view(-1).__setitem__(len(t[name].view(-1)) // 2, math.nan))
    assert check_finite(Checkpoint.open(folder)) == [f"{name}: NaN or Inf in {BLOCK}"]


def test_a_missing_tensor_is_named(folder):
    name = linear(folder)
    change(folder, BLOCK, lambda t: t.pop(name))
    checkpoint = Checkpoint.open(folder)
    assert check_index(checkpoint) == [f"{name}: missing in {BLOCK}, where the index places it"]
    assert check_layout(checkpoint) == [f"{name}: missing"]


def test_a_tensor_that_lies_in_two_files_or_in_no_index_is_named(folder):
    name = linear(folder)
    change(folder, "block-00000.safetensors", lambda t: t.update({name: torch.zeros(1), "ghost": torch.zeros(1)}))
    assert sorted(check_index(Checkpoint.open(folder))) == [
        "ghost: in block-00000.safetensors, but the index has none",
        f"{name}: in block-00000.safetensors, but the index places it in {BLOCK}",
    ]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda t: t[:-1], r"expected int32 \[96, 8\], found int32 \[95, 8\]"),
        (lambda t: t.long(), r"expected int32 \[96, 8\], found int64 \[96, 8\]"),
    ],
)
def test_wrong_types_and_shapes_are_named(folder, wrong, said):
    name = linear(folder)
    change(folder, BLOCK, lambda t: t.update({name: wrong(t[name]).contiguous()}))
    (fault,) = check_layout(Checkpoint.open(folder))
    assert re.fullmatch(f"{re.escape(name)}: {said}", fault)


def test_a_linear_that_was_not_quantized_or_not_in_the_model_is_named(sound, folder):
    def rename(config):
        for layout in config["quantization_config"]["layouts"]:
            layout["mlp.down"]["linears"]["mlp.ghost"] = layout["mlp.down"]["linears"].pop("mlp.down_proj")

    edit_json(folder / "config.json", rename)
    name = linear(folder, "mlp.down_proj", "")[:-1]
    faults = check_source(Checkpoint.open(folder), sound.model)
    assert f"{name}: not quantized" in faults
    assert f"{name.replace('down_proj', 'ghost')}: not in {sound.model}" in faults
    assert f"{name}.weight_packed: not of {sound.model}" in faults


def test_a_linear_that_was_quantized_twice_is_named(sound, folder):
    def repeat(config):
        for layout in config["quantization_config"]["layouts"]:
            layout["mlp.gate_up"]["linears"]["mlp.down_proj"] = layout["mlp.down"]["linears"]["mlp.down_proj"]

    edit_json(folder / "config.json", repeat)
    faults = check_source(Checkpoint.open(folder), sound.model)
    assert f"{linear(folder, 'mlp.down_proj', '')[:-1]}: quantized 2 times" in faults


@pytest.mark.parametrize("name", ["input_layernorm.weight", "self_attn.q_proj.bias"])
def test_what_was_not_taken_over_from_the_model_is_named(sound, folder, name):
    name = linear(folder, "", "").removesuffix(".") + name
    change(folder, BLOCK, lambda t: t.pop(name))
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))
    assert check_index(Checkpoint.open(folder)) == []
    assert check_source(Checkpoint.open(folder), sound.model) == [f"{name}: missing"]


def test_a_tensor_of_another_shape_than_in_the_model_is_named(sound, folder):
    name = linear(folder, "mlp.up_proj", "weight_shape")
    change(folder, BLOCK, lambda t: t[name].fill_(7))
    change(folder, "passthrough-00001.safetensors", lambda t: t.update({"lm_head.weight": torch.zeros(3, 64)}))
    faults = check_source(Checkpoint.open(folder), sound.model)
    assert faults == [
        f"{name}: expected (96, 64), found (7, 7)",
        "lm_head.weight: expected float32 [512, 64], found float32 [3, 64]",
    ]


def test_the_checkpoint_of_a_model_with_more_blocks_is_not_of_this_one(sound, folder):
    edit_json(folder / "config.json", lambda c: c["quantization_config"]["block_layouts"].append(0))
    checkpoint = Checkpoint.open(folder)
    assert check_source(checkpoint, sound.model) == [f"config.json: 3 blocks, {sound.model} has 2"]
    assert check_layout(checkpoint) == [f"config.json: 3 blocks, {MANIFEST} has 2"]


def test_images_move_the_logits_unless_the_model_is_blind_or_computes_none(sound):
    model, arch = load_model(sound.output), archs.get("qwen2_vl")
    encoder = arch.encoder(sound.output)
    assert image_effect(model, arch, encoder) > 1e-3
    merger = model.model.visual.merger.mlp[2]
    with torch.no_grad():
        merger.weight.zero_()
    assert image_effect(model, arch, encoder) == 0
    with torch.no_grad():
        merger.weight.fill_(math.nan)
    assert math.isnan(image_effect(model, arch, encoder))


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_lacks_a_weight_is_not_loaded_with_another_made_up(folder):
    name = linear(folder)
    change(folder, BLOCK, lambda t: t.pop(name))
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))
    (folder / MANIFEST).unlink()  # which would tell already
    with pytest.raises(CheckpointError, match=r"has no .*layers\.1\.mlp\.up_proj\.weight_packed"):
        load_model(folder)


def test_what_is_no_checkpoint_of_ours_is_refused(sound, tmp_path):
    with pytest.raises(ConfigError, match=r"has no qe_manifest\.json; give a finished checkpoint"):
        Checkpoint.open(sound.model)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "is damaged: "), ("{}", r"it is damaged, or qe_dist 0.1 wrote it \(KeyError: 'blocks'\)")],
)
def test_a_damaged_manifest_is_named(folder, content, said):
    (folder / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{MANIFEST}:? {said}"):
        Checkpoint.open(folder)


def test_the_command_says_what_is_sound_and_ends_with_0(verify, sound):
    code, out, _ = verify(sound.output, "--source", sound.model)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["ok"] * 6 + ["skipped"]  # vLLM is not here


def test_the_command_lists_all_faults_and_ends_with_1(verify, folder):
    name = linear(folder)
    change(folder, BLOCK, lambda t: t.pop(name))
    code, out, err = verify(folder)
    assert code == 1
    assert f"{BLOCK}: SHA-256 expected" in out
    assert f"{name}: missing" in out
    assert "has 3 faults, listed above" in err
    assert "Traceback" not in err


MEMORY = """
import resource, sys
from pathlib import Path
from qe_dist.checkpoint import verify

def private():  # MiB that are this process's own; pages of mapped files can be dropped at any time
    said = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(said["Anonymous"].split()[0]) / 1024

import threading
checkpoint = verify.Checkpoint.open(Path(sys.argv[1]))
before, seen, done = private(), [], threading.Event()
def watch():
    while not done.wait(0.01):
        seen.append(private())
watcher = threading.Thread(target=watch)
watcher.start()
faults = verify.check_hashes(checkpoint) + verify.check_index(checkpoint) + verify.check_finite(checkpoint)
done.set()
watcher.join()
print(len(faults), max(seen) - before)
"""


def test_the_checks_of_files_hold_a_part_of_a_tensor_whatever_its_size(folder):
    """A tensor of 256 MiB, looked at in slices."""
    big = folder / "passthrough-00002.safetensors"
    save_file({"big": torch.ones(2**15, 2**12, dtype=torch.bfloat16)}, big, metadata={"format": "pt"})
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(big=big.name))
    edit_json(folder / MANIFEST, lambda manifest: manifest["files"].update({big.name: sha256(big)}))
    said = subprocess.run([sys.executable, "-c", MEMORY, folder], capture_output=True, text=True, check=True).stdout
    faults, mib = said.split()
    assert faults == "0"
    assert float(mib) < 100


def test_the_command_says_what_it_could_not_check(verify, tmp_path):
    """Images of a model of text, and names in vLLM where that is not installed."""
    model = tiny_model(tmp_path / "model", "llama")
    quantize(RunConfig(model, load_recipe("rtn-w4a8"), stories(tmp_path / "data", 2), tmp_path / "out"))
    code, out, _ = verify(tmp_path / "out")
    assert (code, "images change" in out) == (0, False)
    assert [line for line in out.splitlines() if line.startswith("skipped")] == [
        "skipped  images: a model of text only",
        "skipped  names in vLLM: vLLM is not installed; qe_dist serves with vLLM 0.32",
    ]
