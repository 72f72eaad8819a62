"""Llama (SmolLM2, TinyLlama): heads may be wider or narrower than hidden size over heads."""

from typing import Any

from torch import nn

from qe_dist.archs.shared.swiglu import SwiGLUDecoder


class Llama(SwiGLUDecoder):
    def layer(self) -> type[nn.Module]:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        return LlamaDecoderLayer

    def head_width(self, text: Any) -> int:
        return text.head_dim
