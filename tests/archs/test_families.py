"""Every family from a model on disk to tokens that a checkpoint of it generates."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qe_dist import archs
from qe_dist.checkpoint import verify
from qe_dist.checkpoint.evaluate import WholeModel
from qe_dist.checkpoint.stream import StreamedModel
from qe_dist.data.samples import load_images
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.io.checkpoint import MANIFEST
from qe_dist.methods.recipes import load_recipe
from qe_dist.serve.blocks import open_blocks
from qe_dist.serve.loading import load_model
from tests.archs.contract import blocks_of_files_equal_the_loaded_model, samples
from tests.tiny import calibration, samples_for, stir, stories, tiny_model

NEAR, ROUTED = "gptq-w8a16", "qe-paper-w4a6"
CHECKS = (verify.check_hashes, verify.check_index, verify.check_finite, verify.check_layout)


@pytest.fixture(scope="module", params=archs.names())
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and checkpoints of it that were made in a wave for each block."""
    root, name = tmp_path_factory.mktemp(request.param), request.param
    model = stir(tiny_model(root / name, name))
    data = (calibration if archs.get(name).has_vision(archs.get(name).tiny) else stories)(root / "data", 4)
    recipes = {recipe: load_recipe(recipe) for recipe in (NEAR, ROUTED)}
    runs = [
        RunConfig(model, recipe, data, root / of, sample_tokens=256, samples_per_batch=2, blocks_per_worker=1)
        for of, recipe in recipes.items()
    ]
    quantize(*runs)
    return model


@pytest.mark.parametrize("recipe", [NEAR, ROUTED])
def test_block_by_block_is_the_loaded_model_bit_for_bit(recipe: str, root: Path) -> None:
    folder = root.parent / recipe
    blocks_of_files_equal_the_loaded_model(archs.get(root.name), folder, samples(folder))


def test_a_checkpoint_of_8_bits_is_the_model_nearly(root: Path) -> None:
    """A wrong name, or an order that another part undoes, would leave nothing of it."""
    arch, shown = archs.get(root.name), samples(root)
    full, rounded = (
        torch.log_softmax(blocks_of_files_equal_the_loaded_model(arch, folder, shown), dim=-1)
        for folder in (root, root.parent / NEAR)
    )
    assert divergence(full, rounded) < 0.01 * divergence(full, full.roll(1, 0))  # of one token from the next


def divergence(full: Tensor, other: Tensor) -> float:
    """Mean KL of log-probabilities [tokens, vocabulary]."""
    return float((full.exp() * (full - other)).sum(dim=-1).mean())


@pytest.mark.nightly
@pytest.mark.parametrize(("one", "other"), [("gate_proj", "up_proj"), ("k_proj", "v_proj")])
def test_two_names_exchanged_in_one_block_are_seen(one: str, other: str, root: Path, tmp_path: Path) -> None:
    """By the measure of the test above, so that it says something of names."""
    left = shutil.ignore_patterns(".run", MANIFEST)  # the manifest has hashes
    folder = shutil.copytree(root.parent / NEAR, tmp_path / "exchanged", ignore=left)
    block = folder / "block-00001.safetensors"
    found = {f".{one}.": f".{other}.", f".{other}.": f".{one}."}
    tensors = load_file(block)
    renamed = {next((n.replace(a, b) for a, b in found.items() if a in n), n): t for n, t in tensors.items()}
    assert renamed.keys() == tensors.keys()
    save_file(renamed, block, metadata={"format": "pt"})
    arch = archs.get(root.name)
    shown = [arch.encoder(root)(sample, load_images(sample)) for sample in samples(root)]
    full, wrong = (logprobs(load_model(place), arch.model_inputs(shown, pad=0)) for place in (root, folder))
    assert divergence(full, wrong) > 0.05 * divergence(full, full.roll(1, 0))


@torch.no_grad()
def logprobs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return torch.log_softmax(model(**inputs, use_cache=False).logits.flatten(0, 1), dim=-1)


def test_it_is_measured_block_by_block_as_whole(root: Path, tmp_path: Path) -> None:
    """What `eval --stream` computes, whose batches go through files between two blocks."""
    arch, folder = archs.get(root.name), root.parent / ROUTED
    examples = [arch.encoder(folder)(sample, load_images(sample)) for sample in samples(folder)]
    source, blocks = open_blocks(folder, arch, "cpu", torch.float32)
    models = (
        StreamedModel(arch, source, blocks, tmp_path, "cpu", torch.float32),
        WholeModel(load_model(folder), arch),
    )
    streamed, whole = ([row for part in model.states(examples, 200) for row in part] for model in models)
    assert len(whole) == len(examples)
    for (one, own), (other, expected) in zip(streamed, whole, strict=True):
        assert one.index == other.index
        assert torch.equal(own, expected)


@pytest.mark.parametrize("recipe", [NEAR, ROUTED])
def test_verify_finds_no_fault(recipe: str, root: Path) -> None:
    folder = root.parent / recipe
    checkpoint = verify.Checkpoint.open(folder)
    assert [fault for check in CHECKS for fault in check(checkpoint)] == []
    assert verify.check_source(checkpoint, root) == []
    arch = archs.get(root.name)
    if arch.has_vision(checkpoint.config):
        assert verify.image_effect(load_model(folder), arch, arch.encoder(folder)) > 0.01


def test_a_checkpoint_generates(root: Path) -> None:
    arch, folder = archs.get(root.name), root.parent / ROUTED
    sample = samples_for(folder)[0]
    prompt = arch.encoder(folder).prompt(sample, load_images(sample))
    inputs = arch.model_inputs([prompt], pad=0)
    out = load_model(folder).generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert out.shape[1] == len(prompt.input_ids) + 5
