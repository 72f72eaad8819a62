"""What Qwen3.5 has beyond what every family promises: a model that drafts tokens, and gates that no rotation passes."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qe_dist import archs
from qe_dist.archs.base import Family
from qe_dist.checkpoint import verify
from qe_dist.checkpoint.export import export
from qe_dist.core.errors import ConfigError
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.io.checkpoint import INDEX, read_manifest
from qe_dist.io.weights import SafetensorsSource
from qe_dist.methods.recipes import load_recipe
from qe_dist.methods.tuning.tune import Tune
from qe_dist.model import open_model
from qe_dist.serve.loading import load_model
from tests.archs.contract import (
    Subject,
    blocks_of_files_equal_the_loaded_model,
    every_tensor_is_claimed_once,
    samples,
    streamed_equals_whole_bit_for_bit,
)
from tests.archs.drafts import draft_shapes
from tests.tiny import calibration, stir, stories, tiny_model

NAME, TEXT = "qwen3_5", "qwen3_5_text"
RECIPES = ("awq-w4a16g32", "gptq+qera-w4a8@0.5")


def with_drafts(folder: Path, arch: Family) -> dict[str, torch.Tensor]:
    """Adds the tensors of a model that drafts tokens to files; returns them."""
    random = torch.Generator().manual_seed(2)
    shapes = draft_shapes(arch, json.loads((folder / "config.json").read_text()))
    drafts = {name: torch.randn(shape, generator=random).bfloat16() for name, shape in shapes.items()}
    save_file(load_file(folder / "model.safetensors") | drafts, folder / "model.safetensors", metadata={"format": "pt"})
    return drafts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that drafts tokens, and checkpoints of it."""
    root, arch = tmp_path_factory.mktemp(NAME), archs.get(NAME)
    model = stir(tiny_model(root / "model", NAME))
    save_file(with_drafts(model, arch), root / "drafts.safetensors")
    data = calibration(root / "data", 3)
    quantize(*(RunConfig(model, load_recipe(name), data, root / name, sample_tokens=256) for name in RECIPES))
    return root


def test_what_drafts_tokens_goes_along_as_it_is(root: Path) -> None:
    drafts = load_file(root / "drafts.safetensors")
    assert len(drafts) == 15
    assert any("mtp.fc.weight (and 14 more) go along unread" in note for note in open_model(root / "model").notes)
    for recipe in RECIPES:
        files = json.loads((root / recipe / INDEX).read_text())["weight_map"]
        for name, tensor in drafts.items():
            assert torch.equal(load_file(root / recipe / files[name])[name], tensor)


@pytest.mark.parametrize("recipe", RECIPES)
def test_smoothed_and_repaired_blocks_are_those_of_the_loaded_model(recipe: str, root: Path) -> None:
    arch, folder = archs.get(NAME), root / recipe
    blocks_of_files_equal_the_loaded_model(arch, folder, samples(folder))
    checkpoint = verify.Checkpoint.open(folder)
    for check in (verify.check_hashes, verify.check_index, verify.check_finite, verify.check_layout):
        assert list(check(checkpoint)) == []
    assert verify.check_source(checkpoint, root / "model") == []


@pytest.mark.nightly
def test_both_kinds_of_blocks_are_tuned(tmp_path: Path) -> None:
    model, recipe = stir(tiny_model(tmp_path / "model", TEXT)), load_recipe("tune-w4a16g32")
    recipe = replace(recipe, tuning=Tune(steps=12, batch=4, checks=3, rate=0.5))
    quantize(RunConfig(model, recipe, stories(tmp_path / "data", 16), tmp_path / "out", sample_tokens=256))
    blocks_of_files_equal_the_loaded_model(archs.get(TEXT), tmp_path / "out", samples(tmp_path / "out"))
    tuned = [block.tuning for block in read_manifest(tmp_path / "out").blocks]
    assert all(one is not None and one.steps == 12 for one in tuned)


def test_qkv_and_z_share_scheme_input_and_down_matrix_and_b_and_a_stay(root: Path) -> None:
    found = verify.Checkpoint.open(root / "gptq+qera-w4a8@0.5").layout.blocks
    linear, full = found[0].groups, found[1].groups
    assert {*linear["linear_attn.qkvz"].linears} == {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z"}
    assert "lr_shared_a" in linear["linear_attn.qkvz"].input
    assert {*full} == {"self_attn.qkv", "self_attn.o", "mlp.gate_up", "mlp.down"}
    tensors = load_file(root / "gptq+qera-w4a8@0.5" / "block-00000.safetensors")
    source = load_file(root / "model" / "model.safetensors")
    for name in ("in_proj_b.weight", "in_proj_a.weight", "conv1d.weight", "A_log", "dt_bias", "norm.weight"):
        assert torch.equal(*(t[f"model.language_model.layers.0.linear_attn.{name}"] for t in (tensors, source)))


@torch.no_grad()
def test_other_engines_find_what_is_left_out_and_compute_what_ours_do(root: Path, tmp_path: Path) -> None:
    """The scale of the input goes into a norm that adds 1 to its weight, and out of b and a, which read it, too."""
    folder, out = root / "awq-w4a16g32", tmp_path / "out"
    export(folder, out, peft=False)
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    targets = [t.removeprefix("re:") for group in told["config_groups"].values() for t in group["targets"]]
    ignored = [re.compile(name.removeprefix("re:")) for name in told["ignore"]]
    files = json.loads((out / INDEX).read_text())["weight_map"]
    linears = {name.rpartition(".")[0] for name in files if re.search(r"(proj\w*|fc)\.weight(_packed)?$", name)}
    assert any(name.startswith("mtp.") for name in linears)
    for name in linears:
        quantized = f"{name}.weight_packed" in files
        assert not (quantized and any(p.search(name) for p in ignored)), name
        # Heads that are scaled differently have one norm: out_proj is written in 16 bits where they are.
        assert quantized == any(re.search(t, name) and not any(p.search(name) for p in ignored) for t in targets), name
    kept = [name for name in linears if name.startswith("mtp.") or name.endswith(("in_proj_b", "in_proj_a"))]
    assert len(kept) == 8 + 2 * 2
    assert all(any(p.search(name) for p in ignored) for name in kept)
    arch = archs.get(NAME)
    shown = [arch.encoder(folder)(s, ()) for s in samples(folder) if not s.images]
    stock, own = (load_model(f)(**arch.model_inputs(shown, pad=0), use_cache=False).logits for f in (out, folder))
    assert float((stock - own).abs().mean() / own.abs().mean()) < 0.01  # scales and norms are rounded to bf16 once more
    plain = load_file(folder / "block-00000.safetensors")
    scaled = load_file(out / "block-00000.safetensors")
    for name in ("input_layernorm.weight", "linear_attn.in_proj_b.weight"):
        assert not torch.equal(*(t[f"model.language_model.layers.0.{name}"] for t in (plain, scaled)))


def test_a_rotation_is_refused_where_something_drafts_tokens(root: Path, tmp_path: Path) -> None:
    run = RunConfig(root / "model", load_recipe("hadamard-w4a8"), calibration(tmp_path, 4), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"has mtp\.fc\.weight and 14 more tensors of a model that drafts tokens"):
        quantize(run)
    assert not (tmp_path / "out").exists()


def test_a_rotated_checkpoint_without_them_is_loaded(tmp_path: Path) -> None:
    arch = archs.get(TEXT)
    model = stir(tiny_model(tmp_path / "model", TEXT, config=dict(arch.tiny) | {"tie_word_embeddings": True}))
    data, out = stories(tmp_path / "data", 4), tmp_path / "out"
    quantize(RunConfig(model, load_recipe("hadamard+gptq-w8a16"), data, out, sample_tokens=256))
    own, full = (blocks_of_files_equal_the_loaded_model(arch, f, samples(f)) for f in (out, model))
    assert (own - full).abs().mean() < 0.1 * full.abs().mean()
    assert verify.check_source(verify.Checkpoint.open(out), model) == []


@pytest.mark.parametrize("name", [NAME, TEXT])
def test_a_model_with_tied_embeddings(name: str, tmp_path: Path) -> None:
    arch = archs.get(name)
    tied = tiny_model(
        tmp_path / name, name, config=dict(arch.tiny) | {"tie_word_embeddings": True}, dtype=torch.float32
    )
    source = SafetensorsSource(stir(tied))
    assert "lm_head.weight" not in source.names()
    whole = arch.auto_class().from_pretrained(tied, dtype=torch.float32).eval()
    subject = Subject(arch, source, whole, [arch.encoder(tied)(s, ()) for s in samples(tied) if not s.images])
    streamed_equals_whole_bit_for_bit(subject)
    every_tensor_is_claimed_once(subject)


def test_a_language_model_may_have_the_names_of_a_model_that_sees(tmp_path: Path) -> None:
    subject = Subject.of(TEXT, tmp_path / "text")
    folder = shutil.copytree(tmp_path / "text", tmp_path / "renamed")
    named = {
        n.replace("model.", "model.language_model."): t for n, t in load_file(folder / "model.safetensors").items()
    }
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_model(folder).source
    assert sorted(source.names()) == sorted(named)
    renamed = Subject(subject.arch, source, subject.whole, subject.examples)
    every_tensor_is_claimed_once(renamed)
    streamed_equals_whole_bit_for_bit(renamed)


def test_saved_again_it_has_the_same_names(tmp_path: Path) -> None:
    subject = Subject.of(NAME, tmp_path / "published")
    subject.whole.save_pretrained(tmp_path / "again", save_original_format=False)
    assert {*SafetensorsSource(tmp_path / "again").names()} == {*subject.source.names()}


def test_every_token_that_ends_an_answer_is_known(tmp_path: Path) -> None:
    """Published models have them beside text_config, which has another one alone."""
    folder = tiny_model(tmp_path / "model", NAME)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 7]}))
    assert {*archs.get(NAME).encoder(folder).end_tokens} == {2, 7}  # type: ignore[attr-defined]
