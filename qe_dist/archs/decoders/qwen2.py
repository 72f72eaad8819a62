"""Qwen2: biases on q, k and v. In models that see images, its rotary tables are multimodal (M-RoPE)."""

from collections.abc import Iterator
from typing import Any

from qe_dist.archs.shared.swiglu import SwiGLUDecoder


class Windowless(SwiGLUDecoder):
    """A decoder whose configuration offers sliding windows in its last blocks, which no published model has."""

    def unsupported(self, text: Any) -> Iterator[str]:
        yield from super().unsupported(text)
        if text.use_sliding_window:
            yield "use_sliding_window true: blocks are streamed with attention to all earlier tokens"


QWEN2 = Windowless("qwen2.modeling_qwen2.Qwen2DecoderLayer", own_head_width=False)
QWEN2_VL = Windowless("qwen2_vl.modeling_qwen2_vl.Qwen2VLDecoderLayer", own_head_width=False)
QWEN2_5_VL = Windowless("qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLDecoderLayer", own_head_width=False)
