"""The decoder block that most families share: attention and a SwiGLU, a norm in front of each, under Llama's names."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from qe_dist.archs.base import Decoder, Site
from qe_dist.core.batch import Batch
from qe_dist.core.spec import Feeder, InputGroup, LinearSpec

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""Norms of every head by itself, between projection and rotary embedding, where a family has them."""
FUSED = {
    "self_attn.qkv": "self_attn.qkv_proj", "self_attn.o": "self_attn.o_proj",
    "mlp.gate_up": "mlp.gate_up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
"""Input group -> vLLM's linear, in its models of this family."""
_ROPES = ("default", "linear", "llama3", "yarn")


class SwiGLUDecoder(Decoder):
    """All that `Decoder` asks for.

    block: class of a block, below `transformers.models` (`llama.modeling_llama.LlamaDecoderLayer`). own_head_width:
    heads have the width `head_dim` of the configuration, which need not be hidden size over heads.
    """

    norm, gain_offset = _NORMS[0], 0.0
    inner_width = "intermediate_size"
    reads_tables_alone = True
    kept: tuple[str, ...] = ()
    # A rotation cannot turn the inner dimension of the MLP (SwiGLU multiplies channel by channel), nor what q and k
    # write (RoPE turns pairs of channels).
    sites: ClassVar[Mapping[str, Site]] = {
        "self_attn.q_proj": Site(None, "stream", _NORMS[0]),
        "self_attn.k_proj": Site(None, "stream", _NORMS[0]),
        "self_attn.v_proj": Site("head", "stream", _NORMS[0]),
        "self_attn.o_proj": Site("stream", "head", None),
        "mlp.gate_proj": Site(None, "stream", _NORMS[1]),
        "mlp.up_proj": Site(None, "stream", _NORMS[1]),
        "mlp.down_proj": Site("stream", None, None),
    }
    tiny: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip

    def __init__(self, block: str, own_head_width: bool, norms_within: tuple[str, ...] = ()) -> None:
        self.block, self.own_head_width, self.norms = block, own_head_width, (*_NORMS, *norms_within)

    def unsupported(self, text: Any) -> Iterator[str]:
        if text.hidden_act != "silu":
            yield f"hidden_act {text.hidden_act!r}: engines compute these blocks with silu alone"
        if (kind := text.rope_parameters["rope_type"]) not in _ROPES:
            yield (
                f"rope_type {kind!r}: its tables depend on the longest sample of a batch; supported are "
                f"{', '.join(_ROPES)}"
            )

    def layer(self) -> type[nn.Module]:
        module, _, name = self.block.rpartition(".")
        block: type[nn.Module] = getattr(importlib.import_module(f"transformers.models.{module}"), name)
        return block

    def head_width(self, text: Any) -> int:
        width: int = text.head_dim if self.own_head_width else text.hidden_size // text.num_attention_heads
        return width

    def groups(self, text: Any, index: int) -> tuple[InputGroup, ...]:
        heads, kv, hidden, wide = (
            text.num_attention_heads, text.num_key_value_heads, text.hidden_size, text.intermediate_size
        )  # fmt: skip
        q, k, v = (self.head_width(text) * n for n in (heads, kv, kv))

        def column(name: str, outputs: int, heads: int | None = None) -> LinearSpec:
            return LinearSpec(name, hidden, outputs, bias=False, split="column", heads=heads)

        def row(name: str, inputs: int, heads: int | None = None) -> LinearSpec:
            return LinearSpec(name, inputs, hidden, bias=False, split="row", heads=heads)

        qkv = tuple(map(column, _QKV, (q, k, v), (heads, kv, kv)))
        gate_up = tuple(column(name, wide) for name in _GATE_UP)
        return (
            InputGroup("self_attn.qkv", qkv, "self_attn.qkv"),
            InputGroup("self_attn.o", (row("self_attn.o_proj", q, heads),), "self_attn.qkv"),
            InputGroup("mlp.gate_up", gate_up, "mlp.gate_up"),
            InputGroup("mlp.down", (row("mlp.down_proj", wide),), "mlp.gate_up", producers=_GATE_UP),
        )

    def others(self, text: Any, index: int) -> tuple[str, ...]:
        return tuple(f"{norm}.weight" for norm in self.norms)

    def scratch(self, text: Any, index: int) -> int:
        return 0

    def feeders(self, text: Any) -> Mapping[str, Feeder]:
        offset = self.gain_offset
        norms = {linear: Feeder(site.norm, offset=offset) for linear, site in self.sites.items() if site.norm}
        values = Feeder("self_attn.v_proj", head=self.head_width(text))
        return norms | {"self_attn.o_proj": values, "mlp.down_proj": Feeder("mlp.up_proj")}

    def context(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        cos, sin = given["position_embeddings"]
        return {"cos": cos, "sin": sin}

    def context_behind(self, context: Mapping[str, Tensor], index: int) -> Mapping[str, Tensor]:
        return context

    def mask(self, block: nn.Module, hidden: Tensor) -> Tensor | None:
        """Which positions [B, 1, L, L] a token sees; None for all before it."""
        return None

    def run(self, block: nn.Module, batch: Batch, index: int) -> Tensor:
        where = block.get_parameter(f"{_NORMS[0]}.weight")  # a quantized block begins with packed integers
        cos, sin = (batch.context[k].to(where) for k in ("cos", "sin"))
        hidden = batch.hidden.to(where)
        mask = self.mask(block, hidden)
        out: Any = block(hidden, attention_mask=mask, position_embeddings=(cos, sin), use_cache=False)
        behind: Tensor = out[0] if isinstance(out, tuple) else out
        return behind
