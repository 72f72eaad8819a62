"""Qwen2 as Qwen2-VL has it: biases on q, k and v; its rotary tables are multimodal (M-RoPE)."""

from torch import nn

from qe_dist.archs.shared.swiglu import SwiGLUDecoder


class Qwen2(SwiGLUDecoder):
    def layer(self) -> type[nn.Module]:
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

        return Qwen2VLDecoderLayer
