"""What every family promises, each promise a function that raises where it is broken."""

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from qe_dist import archs
from qe_dist.archs.base import Family
from qe_dist.checkpoint.compressed_tensors import folded
from qe_dist.core.batch import PADDING, Batch
from qe_dist.core.sample import Example, Sample
from qe_dist.core.spec import BlockSpec, LinearSpec
from qe_dist.data.samples import load_images
from qe_dist.io.rotated import RotatedSource, gains
from qe_dist.io.weights import SafetensorsSource
from qe_dist.methods.rotations.hadamard import Hadamard
from qe_dist.serve.blocks import open_blocks
from qe_dist.serve.loading import load_model
from tests.tiny import samples_for, stir, tiny_model


@dataclass(frozen=True)
class Subject:
    """A family, and a tiny model of it on disk, where no weight is trivial."""

    arch: Family
    source: SafetensorsSource
    whole: Any
    """The model as transformers loads it, in float32."""
    examples: Sequence[Example]
    """Of different lengths; where the model sees images: with one, with two, and with none."""

    @classmethod
    def of(cls, name: str, folder: Path) -> "Subject":
        source = SafetensorsSource(stir(tiny_model(folder, name, dtype=torch.float32)))
        arch = archs.get(name)
        encoder = arch.encoder(source.folder)
        examples = [encoder(s, load_images(s)) for s in samples(source.folder)]
        return cls(arch, source, loaded(arch, folder), examples)

    @cached_property
    def batch(self) -> Batch:
        return self.embedded(self.examples)

    def embedded(self, examples: Sequence[Example]) -> Batch:
        return self.arch.prelude(self.source, "cpu", torch.float32)(examples, 0)

    @property
    def kinds(self) -> Sequence[BlockSpec]:
        """The first block of every kind."""
        return self.arch.spec(self.source).kinds

    def entering(self, index: int) -> Batch:
        """What block `index` reads."""
        batch = self.batch
        for i in range(index):
            batch = self.arch.passed_on(batch.with_hidden(self.arch.run_block(self.block(i), batch, i)), i)
        return batch

    def block(self, index: int) -> torch.nn.Module:
        return self.arch.block(self.source, self.arch.spec(self.source).blocks[index], "cpu", torch.float32)


def linears_of(block: BlockSpec) -> Mapping[str, LinearSpec]:
    return {x.name: x for group in block.groups for x in group.linears}


def loaded(arch: Family, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return arch.auto_class().from_pretrained(folder, dtype=dtype).eval()


def samples(folder: Path) -> list[Sample]:
    """Those of `samples_for`, and one with two images where the model sees any."""
    found = samples_for(folder)
    if not found[0].images:
        return found
    shown = (
        {"type": "image"},
        {"type": "text", "text": "Before,"},
        {"type": "image"},
        {"type": "text", "text": "now."},
    )
    said = ({"type": "text", "text": "It turned."},)
    messages = ({"role": "user", "content": shown}, {"role": "assistant", "content": said})
    both = (*found[1].images, *found[0].images)
    return [*found, Sample(len(found), "here:1", "image", messages=messages, images=both)]


@torch.no_grad()
def streamed(subject: Subject, examples: Sequence[Example]) -> Tensor:
    """Logits of blocks that run one after the other."""
    arch, source, batch = subject.arch, subject.source, subject.embedded(examples)
    for spec in arch.spec(source).blocks:
        block = arch.block(source, spec, "cpu", torch.float32)
        batch = arch.passed_on(batch.with_hidden(arch.run_block(block, batch, spec.index)), spec.index)
    hidden = arch.last_norm(source, "cpu", torch.float32)(batch.hidden)
    return hidden @ source.get(arch.head(source)).T


@torch.no_grad()
def whole(subject: Subject, examples: Sequence[Example]) -> Tensor:
    return subject.whole(**subject.arch.model_inputs(examples, pad=0), use_cache=False).logits


def streamed_equals_whole_bit_for_bit(subject: Subject) -> None:
    found, expected = streamed(subject, subject.examples), whole(subject, subject.examples)
    assert expected.std() > 0.1
    assert torch.equal(found, expected)


def so_does_a_batch_of_text_and_one_sample_alone(subject: Subject) -> None:
    text = [e for e in subject.examples if not e.vision]
    for examples in (text, subject.examples[-1:]):
        assert torch.equal(streamed(subject, examples), whole(subject, examples))


def every_tensor_is_claimed_once(subject: Subject) -> None:
    spec = subject.arch.spec(subject.source)
    claimed = list(spec.passthrough)
    for block in spec.blocks:
        claimed += [block.prefix + name for name in block.others]
        for linear in (linear for group in block.groups for linear in group.linears):
            claimed += [f"{block.prefix}{linear.name}.{n}" for n in ("weight", "bias")[: 1 + linear.bias]]
    assert sorted(claimed) == sorted(subject.source.names())


def the_config_alone_tells_groups_and_heads(subject: Subject) -> None:
    arch, source = subject.arch, subject.source
    unbiased = {
        group.name: replace(group, linears=tuple(replace(x, bias=False) for x in group.linears))
        for block in arch.spec(source).blocks
        for group in block.groups
    }.values()
    assert list(arch.groups(source.config)) == list(unbiased)
    cut = {x.heads: x.out_features if x.split == "column" else x.in_features for g in unbiased for x in g.linears}
    assert all(width % heads == 0 for heads, width in cut.items() if heads)
    assert arch.vision_heads(source.config) >= 0


def engines_have_a_linear_for_every_group(subject: Subject) -> None:
    """vLLM looks for `<module>` in a block, and takes it apart by the names of our linears."""
    modules = subject.arch.in_vllm.modules
    assert {*modules} == {group.name for group in subject.arch.groups(subject.source.config)}
    assert len({*modules.values()}) == len(modules)


def a_wider_config_changes_a_group_and_its_producers(subject: Subject) -> None:
    arch, config = subject.arch, subject.source.config
    before, after = (
        {x.name: (x.in_features, x.out_features) for g in arch.groups(one) for x in g.linears}
        for one in (config, arch.widened(config, 256))
    )
    group = next(g for g in arch.groups(config) if g.producers)
    wider = {name: (before[name][0], 256) for name in group.producers}
    wider |= {x.name: (256, x.out_features) for x in group.linears}
    assert after == before | wider


@torch.no_grad()
def linears_of_a_group_read_the_same_tensor(subject: Subject) -> None:
    for spec in subject.kinds:
        block, seen = subject.block(spec.index), {}
        for name in linears_of(spec):
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name, seen=seen: seen.__setitem__(name, args[0])
            )
        subject.arch.run_block(block, subject.entering(spec.index), spec.index)
        for group in spec.groups:
            first, *others = (seen[x.name] for x in group.linears)
            assert all(other is first for other in others)
            assert first.shape[-1] == group.in_features
        assert len({id(seen[group.linears[0].name]) for group in spec.groups}) == len(spec.groups)


@torch.no_grad()
def producers_absorb_an_order_of_the_channels_that_they_make(subject: Subject) -> None:
    """Rows of the producers and columns of the group in another order: the same block, in full precision."""
    for spec in subject.kinds:
        block, batch = subject.block(spec.index), subject.entering(spec.index)
        before = subject.arch.run_block(block, batch, spec.index)
        for group in (g for g in spec.groups if g.producers):
            order = torch.randperm(group.in_features, generator=torch.Generator().manual_seed(0))
            for name in group.producers:
                for parameter in block.get_submodule(name).parameters():
                    parameter.copy_(parameter[order])
            for linear in group.linears:
                weight = block.get_submodule(linear.name).weight
                weight.copy_(weight[:, order])
        _close(subject.arch.run_block(block, batch, spec.index), before)


@torch.no_grad()
def feeders_absorb_a_scale_of_the_input(subject: Subject) -> None:
    """What a feeder makes divided by s, and the columns that read it times s: the same block, in full precision."""
    every = subject.arch.feeders(subject.source.config)
    for spec in subject.kinds:
        block, batch = subject.block(spec.index), subject.entering(spec.index)
        before = subject.arch.run_block(block, batch, spec.index)
        modules = {name for name, _ in block.named_modules()}
        feeders = {name: feeder for name, feeder in every.items() if name in modules}
        assert feeders.keys() == linears_of(spec).keys() | ({*subject.arch.decoder.kept} & modules)
        for feeder in dict.fromkeys(feeders.values()):
            parameters = list(block.get_submodule(feeder.module).parameters())
            outputs = len(parameters[0])
            scale = torch.rand(outputs, generator=torch.Generator().manual_seed(outputs)) + 0.5
            for parameter in parameters:
                rows = scale if parameter.ndim == 1 else scale[:, None]
                parameter.copy_((parameter + feeder.offset) / rows - feeder.offset)
            for name in (name for name in feeders if feeders[name] == feeder):
                weight = block.get_submodule(name).weight
                heads = scale.view(-1, feeder.head or outputs)
                columns = heads.repeat_interleave(weight.shape[1] // outputs, dim=0).flatten()
                weight.copy_(weight * columns)
                assert torch.equal(folded(columns, feeder, outputs), scale)
        _close(subject.arch.run_block(block, batch, spec.index), before)


def _close(after: Tensor, before: Tensor) -> None:
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def what_is_not_in_a_block_is_named_as_unquantized(subject: Subject) -> None:
    arch = subject.arch
    ignored = [re.compile(n.removeprefix("re:") if n.startswith("re:") else re.escape(n)) for n in arch.unquantized]
    linears = {name for name, module in subject.whole.named_modules() if isinstance(module, torch.nn.Linear)}
    inside = {name for name in linears if re.fullmatch(rf"{re.escape(arch.blocks)}\.\d+\.(.+)", name)}
    inside = {name for name in inside if not name.endswith(tuple(f".{kept}" for kept in arch.decoder.kept))}
    assert inside
    assert all(any(p.fullmatch(name) for p in ignored) for name in linears - inside)
    assert not any(p.fullmatch(name) for p in ignored for name in inside)


def padding_is_marked_and_images_are_told_from_text(subject: Subject) -> None:
    for row, example in enumerate(subject.examples):
        length = example.input_ids.numel()
        assert torch.equal(subject.batch.modality[row, :length], example.modality)
        assert (subject.batch.modality[row, length:] == -1).all()
    assert bool((subject.batch.modality == 1).any()) == subject.arch.has_vision(subject.source.config)


def a_batch_is_the_same_where_it_is_sent_or_spooled(subject: Subject) -> None:
    """By Ray, which pickles it, and as the named tensors of a file, in the type of a GPU and of a CPU."""
    for dtype in (torch.bfloat16, torch.float32):
        batch = subject.arch.prelude(subject.source, "cpu", dtype)(subject.examples, 3)
        for other in (pickle.loads(pickle.dumps(batch)), Batch.from_tensors(load(save(batch.tensors())))):
            found, expected = other.tensors(), batch.tensors()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items())


def a_batch_carries_nothing_that_no_block_needs_any_more(subject: Subject) -> None:
    """Behind the last block only what all blocks read is left."""
    seen, last = [], len(subject.arch.spec(subject.source).blocks) - 1

    class Recorded(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            seen.append(name)
            return super().__getitem__(name)

    batch = subject.arch.passed_on(subject.batch, last - 1)
    recorded = replace(batch, context=Recorded(batch.context))
    subject.arch.run_block(subject.block(last), recorded, last)
    assert {*seen} == batch.context.keys()


@torch.no_grad()
def a_rotated_model_is_the_same_function(subject: Subject) -> None:
    """But for float32, in which weights are handed out and transformers computes norms."""
    arch, source = subject.arch, subject.source
    sites = arch.rotation_sites(source)
    turned = RotatedSource(source, sites, Hadamard().bases(sites.widths, gains(source, sites)))
    found = streamed(replace(subject, source=turned), subject.examples)
    expected = whole(subject, subject.examples)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (turned.get(arch.head(turned)) - source.get(arch.head(source))).abs().max() > 0.1  # it is another model


@torch.no_grad()
def blocks_of_files_equal_the_loaded_model(arch: Family, folder: Path, shown: Sequence[Sample]) -> Tensor:
    """Of a model or checkpoint: logits of its blocks one after the other are those of the whole, which are returned for
    all tokens that are no padding. [tokens, vocabulary]"""
    encoder, model = arch.encoder(folder), load_model(folder)
    examples = [encoder(sample, load_images(sample)) for sample in shown]
    source, blocks = open_blocks(folder, arch, "cpu", torch.float32)
    batch = arch.prelude(source, "cpu", torch.float32)(examples, 0)
    for open_block in blocks:
        batch = batch.with_hidden(open_block()(batch))
    hidden = arch.last_norm(source, "cpu", torch.float32)(batch.hidden)
    logits = model(**arch.model_inputs(examples, pad=0), use_cache=False).logits
    real = batch.modality != PADDING
    assert torch.equal((hidden @ source.get(arch.head(source)).float().T)[real], logits[real])
    assert logits.std() > 0.1
    return logits[real]


CONTRACT = (
    streamed_equals_whole_bit_for_bit,
    so_does_a_batch_of_text_and_one_sample_alone,
    every_tensor_is_claimed_once,
    the_config_alone_tells_groups_and_heads,
    engines_have_a_linear_for_every_group,
    a_wider_config_changes_a_group_and_its_producers,
    linears_of_a_group_read_the_same_tensor,
    producers_absorb_an_order_of_the_channels_that_they_make,
    feeders_absorb_a_scale_of_the_input,
    what_is_not_in_a_block_is_named_as_unquantized,
    padding_is_marked_and_images_are_told_from_text,
    a_batch_is_the_same_where_it_is_sent_or_spooled,
    a_batch_carries_nothing_that_no_block_needs_any_more,
    a_rotated_model_is_the_same_function,
)
