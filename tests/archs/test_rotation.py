"""A rotated model is another model of the same architecture that computes the same function."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qe_dist import archs
from qe_dist.core.batch import PADDING
from qe_dist.core.errors import CheckpointError
from qe_dist.data.samples import load_images
from qe_dist.io.rotated import RotatedSource, gains
from qe_dist.io.weights import SafetensorsSource
from qe_dist.methods.rotations.hadamard import Hadamard
from tests.tiny import MODELS, samples_for, stir, tiny_model

ARCH = archs.get("qwen2_vl")
TINY = dict(ARCH.tiny)
QUAROT, BANDED = Hadamard(), Hadamard(octaves=2.0)


def sized(hidden, heads, kv, section):
    """The tiny configuration in other sizes."""
    config = copy.deepcopy(TINY)
    rope = config["text_config"]["rope_parameters"] | {"mrope_section": section}
    text = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv, "rope_parameters": rope}
    config["text_config"] |= text
    config["vision_config"]["hidden_size"] = hidden
    return config


TIED = TINY | {"tie_word_embeddings": True}
TIED_CONFIGS = {
    "tied": TIED,
    # as transformers 4 wrote it
    "tied within": TINY | {"text_config": TINY["text_config"] | {"tie_word_embeddings": True}},
    # as Qwen2-VL-2B is published
    "tied and flat": {k: v for k, v in TIED.items() if k != "text_config"} | TINY["text_config"],
}
SIZES = {
    "64, heads of 16": TINY,
    "12 * 8, heads of 24": sized(96, 4, 2, [4, 4, 4]),
    "28 * 2, heads of 14, each its own key": sized(56, 4, 4, [3, 2, 2]),
    "no Hadamard matrix of 52 and 26": sized(52, 2, 1, [5, 4, 4]),
}


def model(folder, config, dtype=torch.float32, arch="qwen2_vl"):
    """On disk; tied embeddings once; every bias and every gain is something."""
    stir(tiny_model(folder, arch, config=config, dtype=dtype))
    weights = load_file(folder / "model.safetensors")
    if config in TIED_CONFIGS.values():
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return SafetensorsSource(folder)


def rotated(source, rotation=QUAROT):
    sites = archs.for_config(source.config).rotation_sites(source)
    return RotatedSource(source, sites, rotation.bases(sites.widths, gains(source, sites)))


def hf_model(source, folder):
    """What transformers makes of a source, in float64."""
    folder.mkdir()
    save_file({n: source.get(n) for n in source.names()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(source.config))
    return archs.for_config(source.config).auto_class().from_pretrained(folder, dtype=torch.float64).eval()


def examples(source):
    encoder = archs.for_config(source.config).encoder(source.folder)
    return [encoder(s, load_images(s)) for s in samples_for(source.folder)]


@pytest.mark.parametrize(
    ("config", "rotation"),
    [
        *(pytest.param(config, QUAROT, id=name) for name, config in SIZES.items()),
        *(pytest.param(config, BANDED, id=f"{name}, in bands") for name, config in TIED_CONFIGS.items()),
        pytest.param(TINY, BANDED, id="in bands"),
    ],
)
@torch.no_grad()
def test_the_rotated_model_is_the_same_function(config, rotation, tmp_path):
    """But for float32, in which weights are handed out and transformers computes norms."""
    check_function(model(tmp_path / "source", config), rotation, tmp_path)


LLAMA = archs.get("llama").tiny


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}])
@torch.no_grad()
def test_so_is_that_of_a_model_of_text(changes, tmp_path):
    check_function(model(tmp_path / "source", LLAMA | changes, arch="llama"), QUAROT, tmp_path)


def check_function(source, rotation, tmp_path):
    turned = rotated(source, rotation)
    inputs = archs.for_config(source.config).model_inputs(examples(source), pad=0)
    before, after = hf_model(source, tmp_path / "before"), hf_model(turned, tmp_path / "after")
    expected, found = (m(**inputs, use_cache=False).logits for m in (before, after))
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    stream, turned_stream = (m.get_input_embeddings().weight for m in (before, after))
    assert (stream - turned_stream).abs().max() > 0.1  # it is another model


@pytest.mark.parametrize("name", TIED_CONFIGS)
def test_a_tied_head_becomes_a_tensor_of_its_own(name, tmp_path):
    source = model(tmp_path / "source", TIED_CONFIGS[name])
    turned = rotated(source)
    assert "lm_head.weight" not in source.names()
    assert set(turned.names()) == {*source.names(), "lm_head.weight"}
    assert turned.shape("lm_head.weight") == (512, 64)
    assert "lm_head.weight" in ARCH.spec(turned).passthrough
    loaded = hf_model(turned, tmp_path / "after")
    assert not loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight
    assert source.config == TIED_CONFIGS[name]  # is not changed


def test_a_missing_head_is_not_made_up(tmp_path):
    source = model(tmp_path / "source", TINY)
    weights = load_file(source.folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, source.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor lm_head\.weight"):
        rotated(SafetensorsSource(source.folder))


def test_what_is_quantized_is_rounded_once_and_all_else_has_the_dtype_of_the_source(tmp_path):
    source = model(tmp_path / "source", TINY, torch.bfloat16)
    turned = rotated(source)
    spec = ARCH.spec(turned)
    quantized = {f"{b.prefix}{x.name}.weight" for b in spec.blocks for g in b.groups for x in g.linears}
    for name in turned.names():
        tensor = turned.get(name)
        assert tensor.shape == turned.shape(name)
        changed = name in turned.sites.tensors
        assert tensor.dtype == (torch.float32 if changed and name in quantized else torch.bfloat16), name
        assert changed or name in turned.sites.norms or torch.equal(tensor, source.get(name))


@torch.no_grad()
def test_no_channel_of_the_rotated_outlier_model_stands_out():
    """Peak of the largest channel over that of the median, where an offline rotation reaches; down keeps its own."""
    source = SafetensorsSource(MODELS / "outlier")
    before, after, banded = (peaks(s) for s in (source, rotated(source), rotated(source, BANDED)))
    for group in ("self_attn.qkv", "mlp.gate_up"):
        assert before[group] > 10
        assert after[group] < 2
        assert after[group] < banded[group] < 0.7 * before[group]
    assert after["mlp.down"] == pytest.approx(before["mlp.down"], rel=0.01)


def peaks(source):
    """The worst of all blocks, of every input group."""
    chosen = examples(source)
    batch = ARCH.prelude(source, "cpu", torch.float32)(chosen, 0)
    worst = {}
    for spec in ARCH.spec(source).blocks:
        block = ARCH.block(source, spec, "cpu", torch.float32)
        seen = {}
        for group in spec.groups:
            reader = block.get_submodule(group.linears[0].name)
            reader.register_forward_pre_hook(
                lambda module, args, name=group.name, seen=seen: seen.__setitem__(name, args[0])
            )
        batch = batch.with_hidden(ARCH.run_block(block, batch, spec.index))
        for name, x in seen.items():
            channels = x[batch.modality != PADDING].abs().amax(dim=0)
            worst[name] = max(worst.get(name, 0.0), float(channels.max() / channels.median()))
    return worst
