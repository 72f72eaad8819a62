"""Llama (SmolLM2, TinyLlama): heads may be wider or narrower than hidden size over heads."""

from qe_dist.archs.shared.swiglu import SwiGLUDecoder

LLAMA = SwiGLUDecoder("llama.modeling_llama.LlamaDecoderLayer", own_head_width=True)
