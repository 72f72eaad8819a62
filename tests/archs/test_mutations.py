"""Families that are wrong in one place each, and the promise of the contract that breaks by it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from torch import nn

from qe_dist import archs
from qe_dist.archs.base import EngineNames, Family, Site
from qe_dist.archs.decoders.qwen2 import Windowless
from qe_dist.archs.shared.swiglu import SwiGLUDecoder
from qe_dist.core.errors import QEError
from qe_dist.core.spec import Feeder
from tests.archs import contract
from tests.archs.contract import Subject


def changed(part: Any, **members: Any) -> Any:
    """A copy of a decoder or front end with other methods or fields."""
    other = copy.copy(part)
    other.__class__ = type("Mutant", (type(part),), members)
    vars(other).update({name: members[name] for name in vars(part) if name in members})
    return other


def decoder(name: str, **methods: Any) -> Family:
    arch = archs.get(name)
    return replace(arch, decoder=changed(arch.decoder, **methods))


@dataclass(frozen=True)
class _Exchanged:
    """A source where two linears have each other's names."""

    source: Any
    one: str
    other: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def get(self, name: str) -> Any:
        for here, there in ((self.one, self.other), (self.other, self.one)):
            if f".{here}." in name:
                return self.source.get(name.replace(here, there))
        return self.source.get(name)


def exchanged(name: str, one: str, other: str) -> Family:
    class Mutant(Family):
        def block(self, source: Any, *rest: Any) -> nn.Module:
            return super().block(_Exchanged(source, one, other), *rest)

    return Mutant(**vars(archs.get(name)))


def mrope_backwards(name: str) -> Family:
    class Mutant(Family):
        def hf_config(self, config: Any) -> Any:
            made = super().hf_config(config)
            made.text_config.rope_parameters["mrope_section"].reverse()
            return made

    return Mutant(**vars(archs.get(name)))


def without_qk_norm(self: Any, block: nn.Module, batch: Any, index: int) -> Any:
    block.self_attn.q_norm = nn.Identity()
    return SwiGLUDecoder.run(self, block, batch, index)


def one_group_too_few(self: Any, text: Any, index: int) -> Any:
    qkv, o, gate_up, down = SwiGLUDecoder.groups(self, text, index)
    return qkv, replace(o, linears=o.linears + down.linears), gate_up


def half_the_producers(self: Any, text: Any, index: int) -> Any:
    *others, down = SwiGLUDecoder.groups(self, text, index)
    return *others, replace(down, producers=down.producers[1:])


def down_fed_by_gate(self: Any, text: Any) -> Any:
    return {**SwiGLUDecoder.feeders(self, text), "mlp.down_proj": Feeder("mlp.gate_proj")}


def heads_that_do_not_divide(self: Any, text: Any, index: int) -> Any:
    qkv, *others = SwiGLUDecoder.groups(self, text, index)
    q, k, v = qkv.linears
    return replace(qkv, linears=(replace(q, heads=text.hidden_size + 1), k, v)), *others


def o_writes_nothing() -> dict[str, Site]:
    return {**SwiGLUDecoder.sites, "self_attn.o_proj": Site(None, "head", None)}


def late(self: Any, block: nn.Module, batch: Any, index: int) -> Any:
    return type(archs.get("qwen3_vl").decoder).run(self, block, batch, index - 1)


def early(self: Any, context: Any, index: int) -> Any:
    return type(archs.get("qwen3_vl").decoder).context_behind(self, context, index + 1)


def only_the_merger(self: Any, config: Any) -> tuple[str, ...]:
    return ("visual.merger.linear_fc2",)


def frontend(name: str, **methods: Any) -> Family:
    arch = archs.get(name)
    return replace(arch, frontend=changed(arch.frontend, **methods))


def renamed(name: str, **prefixes: tuple[str, ...]) -> Family:
    arch = archs.get(name)
    return replace(arch, on_disk={**arch.on_disk, **{f"{p}.": names for p, names in prefixes.items()}})


class _GateFirst(_Exchanged):
    """A source whose `q_proj` has, in every head, the gate in front of the query."""

    def get(self, name: str) -> Any:
        tensor = self.source.get(name)
        if not name.endswith("q_proj.weight"):
            return tensor
        return tensor.unflatten(0, (-1, 2, archs.get("qwen3_5").tiny["text_config"]["head_dim"])).flip(1).flatten(0, 2)


def gate_first() -> Family:
    class Mutant(Family):
        def block(self, source: Any, *rest: Any) -> nn.Module:
            return super().block(_GateFirst(source, "", ""), *rest)

    return Mutant(**vars(archs.get("qwen3_5")))


def settings(name: str, **changes: Any) -> Family:
    """A family that reads other settings than those that are there."""

    class Mutant(Family):
        def hf_config(self, config: Any) -> Any:
            made = super().hf_config(config)
            for field, value in changes.items():
                setattr(made.get_text_config(), field, value)
            return made

    return Mutant(**vars(archs.get(name)))


def open_gate(self: Any, block: nn.Module, batch: Any, index: int) -> Any:
    def opened(_: nn.Module, args: Any, made: Any) -> Any:
        heads = made.unflatten(-1, (-1, 2, block.self_attn.head_dim)).clone()
        heads[..., 1, :] = 100.0
        return heads.flatten(-3)

    if "self_attn" in block._modules:
        block.self_attn.q_proj.register_forward_hook(opened)
    return SwiGLUDecoder.run(self, block, batch, index)


def every_block_sees_all(self: Any, block: nn.Module, hidden: Any) -> Any:
    """The mask of attention in both ways, where blocks have attention."""
    rows, length, _ = hidden.shape
    return hidden.new_ones((rows, 1, length, length)).bool() if "self_attn" in block._modules else None


def net_without_its_last_token(self: Any, block: nn.Module, hidden: Any) -> Any:
    """A mask of padding that is one token too long, where blocks have a delta net."""
    if "self_attn" in block._modules:
        return None
    mask = hidden.new_ones(hidden.shape[:2])
    mask[:, -1] = 0
    return mask


def z_by_itself(self: Any, text: Any, index: int) -> Any:
    first, *others = type(archs.get("qwen3_5").decoder).groups(self, text, index)
    if text.layer_types[index] == "full_attention":
        return first, *others
    return replace(first, linears=first.linears[:1]), replace(first, name="z", linears=first.linears[1:]), *others


def one_norm_for_all_heads(self: Any, text: Any) -> Any:
    feeders = type(archs.get("qwen3_5").decoder).feeders(self, text)
    return {**feeders, "linear_attn.out_proj": Feeder("linear_attn.norm")}


VALUES_ROTATED = {name: SwiGLUDecoder.sites[name] for name in ("self_attn.v_proj", "self_attn.o_proj")}
B_READS_NOTHING = {"linear_attn.in_proj_b": Site(None, None, None)}
STREAMED, ROTATED = contract.streamed_equals_whole_bit_for_bit, contract.a_rotated_model_is_the_same_function
MUTATIONS: dict[str, tuple[str, Callable[[], Family], Callable[[Subject], None]]] = {
    "gate and up exchanged": ("llama", lambda: exchanged("llama", "gate_proj", "up_proj"), STREAMED),
    "k and v exchanged": ("qwen2", lambda: exchanged("qwen2", "k_proj", "v_proj"), STREAMED),
    "sliding window forgotten": ("mistral", lambda: decoder("mistral", mask=SwiGLUDecoder.mask), STREAMED),
    "norm of q dropped": ("qwen3", lambda: decoder("qwen3", run=without_qk_norm), STREAMED),
    "norms of q and k not claimed": (
        "qwen3", lambda: decoder("qwen3", norms=SwiGLUDecoder("", True).norms), contract.every_tensor_is_claimed_once
    ),
    "heads of hidden size over heads": (
        "qwen3", lambda: decoder("qwen3", head_width=Windowless("", False).head_width), STREAMED
    ),
    "heads that do not divide": (
        "llama", lambda: decoder("llama", groups=heads_that_do_not_divide),
        contract.the_config_alone_tells_groups_and_heads,
    ),
    "down in the group of o": (
        "qwen2", lambda: decoder("qwen2", groups=one_group_too_few), contract.linears_of_a_group_read_the_same_tensor
    ),
    "gate is no producer": (
        "llama", lambda: decoder("llama", groups=half_the_producers),
        contract.producers_absorb_an_order_of_the_channels_that_they_make,
    ),
    "down is fed by gate": (
        "mistral", lambda: decoder("mistral", feeders=down_fed_by_gate), contract.feeders_absorb_a_scale_of_the_input
    ),
    "o writes into no stream": ("qwen3", lambda: decoder("qwen3", sites=o_writes_nothing()), ROTATED),
    "M-RoPE backwards": ("qwen2_5_vl", lambda: mrope_backwards("qwen2_5_vl"), STREAMED),
    "interleaved M-RoPE backwards": ("qwen3_vl", lambda: mrope_backwards("qwen3_vl"), STREAMED),
    "no DeepStack": ("qwen3_vl", lambda: decoder("qwen3_vl", context=SwiGLUDecoder.context), STREAMED),
    "DeepStack a block late": ("qwen3_vl", lambda: decoder("qwen3_vl", run=late), STREAMED),
    "DeepStack dropped too early": (
        "qwen3_vl", lambda: decoder("qwen3_vl", context_behind=early), STREAMED
    ),
    "DeepStack goes all the way": (
        "qwen3_vl", lambda: decoder("qwen3_vl", context_behind=SwiGLUDecoder.context_behind),
        contract.a_batch_carries_nothing_that_no_block_needs_any_more,
    ),
    "DeepStack is not rotated": ("qwen3_vl", lambda: frontend("qwen3_vl", stream_writers=only_the_merger), ROTATED),
    "tower not left out": (
        "qwen2_5_vl", lambda: frontend("qwen2_5_vl", unquantized=("visual.merger",)),
        contract.what_is_not_in_a_block_is_named_as_unquantized,
    ),
    "tower under another name": ("qwen2_vl", lambda: renamed("qwen2_vl", visual=("vision.",)), STREAMED),
    "no group in the engine": (
        "llama", lambda: replace(archs.get("llama"), in_vllm=EngineNames("model.layers", {}, "")),
        contract.engines_have_a_linear_for_every_group,
    ),
    "q and gate exchanged": ("qwen3_5", gate_first, STREAMED),
    "gate always open": ("qwen3_5", lambda: decoder("qwen3_5", run=open_gate), STREAMED),
    "b and a exchanged": ("qwen3_5", lambda: exchanged("qwen3_5", "in_proj_b", "in_proj_a"), STREAMED),
    "gated attention sees later tokens": ("qwen3_5", lambda: decoder("qwen3_5", mask=every_block_sees_all), STREAMED),
    "mask of the delta net too long": (
        "qwen3_5_text", lambda: decoder("qwen3_5_text", mask=net_without_its_last_token), STREAMED
    ),
    "layer types exchanged": (
        "qwen3_5",
        lambda: settings("qwen3_5", layer_types=["full_attention", "linear_attention", "linear_attention"]), STREAMED,
    ),
    "one head of keys for all values": (
        "qwen3_5_text", lambda: settings("qwen3_5_text", linear_num_key_heads=1, linear_key_head_dim=32), STREAMED
    ),
    "interleaved M-RoPE of Qwen3.5 backwards": ("qwen3_5", lambda: mrope_backwards("qwen3_5"), STREAMED),
    "query without its gate": (
        "qwen3_5", lambda: decoder("qwen3_5", groups=SwiGLUDecoder.groups), contract.every_tensor_is_claimed_once
    ),
    "state of the delta net not claimed": (
        "qwen3_5", lambda: decoder("qwen3_5", others=SwiGLUDecoder.others), contract.every_tensor_is_claimed_once
    ),
    "z in a group of its own": (
        "qwen3_5", lambda: decoder("qwen3_5", groups=z_by_itself), contract.linears_of_a_group_read_the_same_tensor
    ),
    "norm of the delta net for all heads at once": (
        "qwen3_5", lambda: decoder("qwen3_5", feeders=one_norm_for_all_heads),
        contract.feeders_absorb_a_scale_of_the_input,
    ),
    "(1 + w) taken for w": ("qwen3_5", lambda: decoder("qwen3_5", gain_offset=0.0), ROTATED),
    "(1 + w) taken for w in a feeder": (
        "qwen3_5", lambda: decoder("qwen3_5", gain_offset=0.0), contract.feeders_absorb_a_scale_of_the_input
    ),
    "b does not read the rotated stream": (
        "qwen3_5", lambda: decoder("qwen3_5", sites={**archs.get("qwen3_5").decoder.sites, **B_READS_NOTHING}), ROTATED
    ),
    "values rotated in front of the gate": (
        "qwen3_5", lambda: decoder("qwen3_5", sites={**archs.get("qwen3_5").decoder.sites, **VALUES_ROTATED}), ROTATED
    ),
    "blind": (
        "qwen3_vl", lambda: frontend("qwen3_vl", has_vision=lambda *_: False),
        contract.padding_is_marked_and_images_are_told_from_text,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return {name: Subject.of(name, tmp_path_factory.mktemp(name)) for name in {name for name, *_ in MUTATIONS.values()}}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_contract_sees_it(mutation: str, subjects: dict[str, Subject]) -> None:
    name, mutate, promise = MUTATIONS[mutation]
    promise(subjects[name])
    with pytest.raises((AssertionError, QEError)):
        promise(replace(subjects[name], arch=mutate()))
