"""Qwen3.5 to 3.8: three of four blocks are a gated delta net (arXiv 2412.06464), the fourth is attention with a gate.

The delta net mixes tokens by a recurrence: a short convolution over q, k and v, and a state for each value head. Four
linears read the norm's output: `in_proj_qkv` (all heads of q, then of k, then of v), `in_proj_z` (the gate), and two
with an output for each value head, b (how much a token overwrites) and a (how fast the state decays). b and a stay in
16 bits: they are a thousandth of the weights, and steer the state of all later tokens. Engines compute qkv and z at
once, so both are one input group. What the delta net gives has a norm for each head, multiplied by silu(z).

In the attention, `q_proj` makes query and gate, head by head; sigmoid(gate) multiplies what o reads. A quarter of a
head is rotated (RoPE), by interleaved M-RoPE where the model sees images. Norms of the stream and of q and k are
(1 + w); that of the delta net is not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from qe_dist.archs.base import Site
from qe_dist.archs.shared.swiglu import FUSED, QK_NORMS, SwiGLUDecoder
from qe_dist.core.spec import Feeder, InputGroup, LinearSpec

LINEAR, FULL = "linear_attention", "full_attention"
_NET = "linear_attn"
_B_A = (f"{_NET}.in_proj_b", f"{_NET}.in_proj_a")
_OUT, _IN = f"{_NET}.out", f"{_NET}.qkvz"
FUSED_HERE = {_IN: f"{_NET}.in_proj_qkvz", _OUT: f"{_NET}.out_proj", **FUSED}
"""Input group -> vLLM's linear."""
LOADED_AS = {_IN: f"{_NET}.in_proj_qkv"}
"""vLLM renames what begins as in_proj_qkv to in_proj_qkvz: once."""
_CHUNK = 64
"""Tokens that the delta rule in plain torch takes at once."""


class Qwen35(SwiGLUDecoder):
    gain_offset = 1.0
    kept = _B_A
    # The gates multiply channel by channel, so that neither what v writes nor what the delta net gives can be rotated.
    sites: ClassVar[Mapping[str, Site]] = {
        **SwiGLUDecoder.sites,
        "self_attn.v_proj": Site(None, "stream", SwiGLUDecoder.norm),
        "self_attn.o_proj": Site("stream", None, None),
        **{n: Site(None, "stream", SwiGLUDecoder.norm) for n in (f"{_NET}.in_proj_qkv", f"{_NET}.in_proj_z", *_B_A)},
        f"{_NET}.out_proj": Site("stream", None, None),
    }
    tiny: ClassVar[Mapping[str, Any]] = {
        **SwiGLUDecoder.tiny,
        "head_dim": 32, "num_hidden_layers": 3, "layer_types": [LINEAR, FULL, LINEAR],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }  # fmt: skip

    def unsupported(self, text: Any) -> Iterator[str]:
        yield from super().unsupported(text)
        said = text.to_dict()
        for kind in sorted({*text.layer_types} - {LINEAR, FULL}):
            yield f"layer_types with {kind!r}: blocks are {LINEAR} or {FULL}"
        if said["attention_bias"]:
            yield "attention_bias true: vLLM has no bias behind its attention"
        if (gate := said.get("output_gate_type", "silu")) not in ("silu", "swish"):
            yield f"output_gate_type {gate!r}: transformers computes silu all the same, and vLLM does not"
        if not said.get("attn_output_gate", True):
            yield "attn_output_gate false: transformers has the gate all the same, and vLLM does not"
        if said["rope_parameters"].get("mrope_interleaved") is False:
            yield "mrope_interleaved false: transformers interleaves all the same, and vLLM does not"

    def groups(self, text: Any, index: int) -> tuple[InputGroup, ...]:
        qkv, o, gate_up, down = super().groups(text, index)
        if text.layer_types[index] == LINEAR:
            return *self._delta_net(text), gate_up, down
        query, *others = qkv.linears
        query_and_gate = replace(query, out_features=2 * query.out_features)
        return replace(qkv, linears=(query_and_gate, *others)), o, gate_up, down

    def _delta_net(self, text: Any) -> tuple[InputGroup, InputGroup]:
        """Tensor parallelism deals out heads of keys, each with all value heads that read it."""
        heads, hidden = text.linear_num_key_heads, text.hidden_size
        keys, values = heads * text.linear_key_head_dim, text.linear_num_value_heads * text.linear_value_head_dim

        def column(name: str, outputs: int) -> LinearSpec:
            return LinearSpec(f"{_NET}.{name}", hidden, outputs, bias=False, split="column", heads=heads)

        read = column("in_proj_qkv", 2 * keys + values), column("in_proj_z", values)
        out = LinearSpec(f"{_NET}.out_proj", values, hidden, bias=False, split="row", heads=heads)
        return InputGroup(_IN, read, _IN), InputGroup(_OUT, (out,), _IN)

    def others(self, text: Any, index: int) -> tuple[str, ...]:
        if text.layer_types[index] == FULL:
            return (*super().others(text, index), *(f"{norm}.weight" for norm in QK_NORMS))
        own = (f"{_NET}.A_log", f"{_NET}.dt_bias", f"{_NET}.conv1d.weight", f"{_NET}.norm.weight")
        return (*super().others(text, index), *own, *(f"{name}.weight" for name in _B_A))

    def scratch(self, text: Any, index: int) -> int:
        """The delta rule in plain torch holds q, k and v before and behind the convolution, ten tensors of a key or
        value for each value head, and four of the tokens of a chunk with each other."""
        if text.layer_types[index] == FULL:
            return 0
        heads: int = text.linear_num_value_heads
        keys: int = text.linear_key_head_dim
        values: int = text.linear_value_head_dim
        mixed = 2 * keys * int(text.linear_num_key_heads) + heads * values
        return 4 * mixed + heads * (10 * max(keys, values) + 4 * _CHUNK)

    def feeders(self, text: Any) -> Mapping[str, Feeder]:
        """The norm of the delta net has a weight for each channel of a head, and serves all heads."""
        return {**super().feeders(text), f"{_NET}.out_proj": Feeder(f"{_NET}.norm", head=text.linear_value_head_dim)}


QWEN3_5 = Qwen35("qwen3_5.modeling_qwen3_5.Qwen3_5DecoderLayer", own_head_width=True)
