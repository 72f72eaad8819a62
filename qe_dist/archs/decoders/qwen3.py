"""Qwen3: a norm on every head of q and k, and heads of a width of their own.

Behind its first blocks, the decoder of Qwen3-VL adds features of early layers of the vision tower to the image tokens
(DeepStack, arXiv 2406.04334), so they travel with each batch.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qe_dist.archs.decoders.qwen2 import Windowless
from qe_dist.archs.shared.swiglu import QK_NORMS, SwiGLUDecoder
from qe_dist.core.batch import Batch

_MASK, _FEATURES = "visual", "deepstack"


def _biases(text: Any) -> Iterator[str]:
    if text.attention_bias:
        yield "attention_bias true: vLLM has no bias behind its attention"


class Qwen3(Windowless):
    def unsupported(self, text: Any) -> Iterator[str]:
        yield from super().unsupported(text)
        yield from _biases(text)


class Qwen3VL(SwiGLUDecoder):
    reads_tables_alone = False

    def unsupported(self, text: Any) -> Iterator[str]:
        yield from super().unsupported(text)
        yield from _biases(text)
        if not text.rope_parameters["mrope_interleaved"]:
            yield "mrope_interleaved false: transformers interleaves all the same, and vLLM does not"

    def context(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """visual: whether a token is of an image [B, L]. deepstack.I: what block I adds to those [images' tokens, D];
        both are missing where no sample has an image."""
        context = super().context(given)
        features = given["deepstack_visual_embeds"]
        if features is None:
            return context
        added = {f"{_FEATURES}.{i}": one for i, one in enumerate(features)}
        return context | {_MASK: given["visual_pos_masks"]} | added

    def context_behind(self, context: Mapping[str, Tensor], index: int) -> Mapping[str, Tensor]:
        done = {f"{_FEATURES}.{i}" for i in range(index + 1)}
        left = {name: tensor for name, tensor in context.items() if name not in done}
        if not any(name.startswith(_FEATURES) for name in left):
            left.pop(_MASK, None)
        return left

    @torch.no_grad()
    def run(self, block: nn.Module, batch: Batch, index: int) -> Tensor:
        hidden = super().run(block, batch, index)
        features = batch.context.get(f"{_FEATURES}.{index}")
        if features is None:
            return hidden
        hidden[batch.context[_MASK].to(hidden.device)] += features.to(hidden)
        return hidden


QWEN3 = Qwen3("qwen3.modeling_qwen3.Qwen3DecoderLayer", own_head_width=True, norms_within=QK_NORMS)
QWEN3_VL = Qwen3VL(
    "qwen3_vl.modeling_qwen3_vl.Qwen3VLTextDecoderLayer", own_head_width=True, norms_within=QK_NORMS
)  # fmt: skip
