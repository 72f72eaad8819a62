"""Every architecture file: block by block equals the Hugging Face model, and nothing of it is lost."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qe_dist import archs
from qe_dist.checkpoint.compressed_tensors import folded
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.data.samples import load_images
from qe_dist.io.weights import SafetensorsSource
from tests.tiny import samples_for, tiny_model


@pytest.fixture(scope="module", params=archs.names())
def model(request, tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    return archs.get(request.param), SafetensorsSource(folder)


@pytest.fixture(scope="module")
def examples(model):
    arch, source = model
    encoder = arch.encoder(source.folder)
    return [encoder(s, load_images(s)) for s in samples_for(source.folder)]


def hf_model(arch, source):
    return arch.auto_class().from_pretrained(source.folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_prelude_and_blocks_and_coda_equal_the_whole_model(model, examples):
    arch, source = model
    whole = hf_model(arch, source)
    batch = arch.prelude(source, "cpu", torch.float32)(examples, 0)
    for spec in arch.spec(source).blocks:
        block = arch.block(source, spec, "cpu", torch.float32)
        batch = batch.with_hidden(arch.run_block(block, batch))
    logits = whole.lm_head(whole.get_decoder().norm(batch.hidden))
    assert torch.equal(logits, whole(**arch.model_inputs(examples, pad=0), use_cache=False).logits)


def test_every_tensor_is_claimed_exactly_once(model):
    arch, source = model
    spec = arch.spec(source)
    claimed = list(spec.passthrough)
    for block in spec.blocks:
        claimed += [block.prefix + name for name in block.others]
        for group in block.groups:
            for linear in group.linears:
                claimed.append(f"{block.prefix}{linear.name}.weight")
                if linear.bias:
                    claimed.append(f"{block.prefix}{linear.name}.bias")
    assert sorted(claimed) == sorted(source.names())


def test_the_config_alone_tells_groups_and_heads(model):
    arch, source = model
    unbiased = [
        replace(group, linears=tuple(replace(x, bias=False) for x in group.linears))
        for group in arch.spec(source).blocks[0].groups
    ]
    assert list(arch.groups(source.config)) == unbiased
    cut = {x.heads: x.out_features if x.split == "column" else x.in_features for g in unbiased for x in g.linears}
    assert all(width % heads == 0 for heads, width in cut.items() if heads)
    assert arch.vision_heads(source.config) >= 0


def test_engines_have_a_linear_for_every_group(model):
    """vLLM looks for `<module>` in a block, and takes it apart by the names of our linears."""
    arch, source = model
    modules = arch.in_vllm.modules
    assert list(modules) == [group.name for group in arch.groups(source.config)]
    assert len({*modules.values()}) == len(modules)


def test_a_wider_config_changes_the_input_of_a_group_and_what_its_producers_make(model):
    arch, source = model
    before, after = (
        {x.name: (x.in_features, x.out_features) for g in arch.groups(config) for x in g.linears}
        for config in (source.config, arch.widened(source.config, 256))
    )
    group = next(g for g in arch.groups(source.config) if g.producers)
    wider = {name: (before[name][0], 256) for name in group.producers}
    wider |= {x.name: (256, x.out_features) for x in group.linears}
    assert after == before | wider


@torch.no_grad()
def test_linears_of_a_group_read_the_same_tensor(model, examples):
    arch, source = model
    spec = arch.spec(source).blocks[0]
    block = arch.block(source, spec, "cpu", torch.float32)
    seen = {}

    def catcher(name):
        return lambda module, args: seen.__setitem__(name, args[0])

    for group in spec.groups:
        for linear in group.linears:
            block.get_submodule(linear.name).register_forward_pre_hook(catcher(linear.name))
    arch.run_block(block, arch.prelude(source, "cpu", torch.float32)(examples, 0))
    for group in spec.groups:
        first, *others = (seen[x.name] for x in group.linears)
        assert all(other is first for other in others)
        assert first.shape[-1] == group.in_features


@torch.no_grad()
def test_producers_absorb_an_order_of_the_channels_that_they_make(model, examples):
    """Rows of the producers and columns of the group in another order: the same block, in full precision."""
    arch, source = model
    spec = arch.spec(source).blocks[0]
    block = arch.block(source, spec, "cpu", torch.float32)
    batch = arch.prelude(source, "cpu", torch.float32)(examples, 0)
    before = arch.run_block(block, batch)
    for group in (g for g in spec.groups if g.producers):
        order = torch.randperm(group.in_features, generator=torch.Generator().manual_seed(0))
        for name in group.producers:
            for parameter in block.get_submodule(name).parameters():
                parameter.copy_(parameter[order])
        for linear in group.linears:
            weight = block.get_submodule(linear.name).weight
            weight.copy_(weight[:, order])
    after = arch.run_block(block, batch)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


@torch.no_grad()
def test_feeders_absorb_a_scale_of_the_input(model, examples):
    """What a feeder makes divided by s, and the columns that read it times s: the same block, in full precision."""
    arch, source = model
    spec = arch.spec(source).blocks[0]
    block = arch.block(source, spec, "cpu", torch.float32)
    batch = arch.prelude(source, "cpu", torch.float32)(examples, 0)
    before = arch.run_block(block, batch)
    feeders = arch.feeders(source.config)
    linears = {x.name: x for group in spec.groups for x in group.linears}
    assert feeders.keys() == linears.keys()
    for feeder in dict.fromkeys(feeders.values()):
        parameters = list(block.get_submodule(feeder.module).parameters())
        outputs = len(parameters[0])
        scale = torch.rand(outputs, generator=torch.Generator().manual_seed(outputs)) + 0.5
        for parameter in parameters:
            parameter.copy_(parameter / (scale if parameter.ndim == 1 else scale[:, None]))
        for name in (name for name in linears if feeders[name] == feeder):
            heads = scale.view(-1, feeder.head or outputs)
            columns = heads.repeat_interleave(linears[name].in_features // outputs, dim=0).flatten()
            weight = block.get_submodule(name).weight
            weight.copy_(weight * columns)
            assert torch.equal(folded(columns, feeder, outputs), scale)
    after = arch.run_block(block, batch)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_everything_that_is_not_in_a_block_is_named_as_unquantized(model):
    arch, source = model
    whole = hf_model(arch, source)
    ignored = [re.compile(n.removeprefix("re:") if n.startswith("re:") else re.escape(n)) for n in arch.unquantized]
    linears = {name for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear)}
    inside = {name for name in linears if name.startswith(arch.blocks + ".")}
    assert inside
    assert all(any(p.fullmatch(name) for p in ignored) for name in linears - inside)
    assert not any(p.fullmatch(name) for p in ignored for name in inside)


def test_padding_is_marked_and_images_are_told_from_text(model, examples):
    arch, source = model
    batch = arch.prelude(source, "cpu", torch.float32)(examples, 0)
    for row, example in enumerate(examples):
        length = example.input_ids.numel()
        assert torch.equal(batch.modality[row, :length], example.modality)
        assert (batch.modality[row, length:] == -1).all()
    assert bool((batch.modality == 1).any()) == arch.has_vision(source.config)


def test_labels_are_the_answers_and_their_end_marks(model, examples):
    arch, source = model
    encoder = arch.encoder(source.folder)
    sample = samples_for(source.folder)[0]
    example = encoder(sample, load_images(sample))
    answer = example.labels[example.labels != -100]
    expected = sample.messages[1]["content"][0]["text"] + encoder.tokenizer.eos_token
    assert encoder.tokenizer.decode(answer) == expected
    prompt = encoder.prompt(sample, load_images(sample))
    assert torch.equal(example.input_ids[: prompt.input_ids.numel()], prompt.input_ids)


def test_unknown_and_quantized_models_are_refused():
    with pytest.raises(ConfigError, match=r"model_type 'gpt9'; supported are: llama, .*docs/how/adding-a-model\.md"):
        archs.for_config({"model_type": "gpt9"})
    assert (Path(__file__).parents[2] / archs.GUIDE).exists()
    with pytest.raises(ConfigError, match="quantized already"):
        archs.for_config({"model_type": "qwen2_vl", "quantization_config": {}})


def test_a_shape_that_contradicts_the_config_is_named(model, tmp_path):
    arch, source = model
    folder = shutil.copytree(source.folder, tmp_path / "wrong")
    (folder / "config.json").write_text(json.dumps(arch.widened(source.config, 128)))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.gate_proj.*\(96, 64\).*\(128, 64\)"):
        arch.spec(SafetensorsSource(folder))
