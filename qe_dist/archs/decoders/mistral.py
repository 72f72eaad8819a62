"""Mistral: Llama, but a token may see only those of a sliding window before it."""

from typing import Any

from torch import Tensor, nn

from qe_dist.archs.shared.swiglu import SwiGLUDecoder


class Mistral(SwiGLUDecoder):
    def mask(self, block: nn.Module, hidden: Tensor) -> Tensor | None:
        from transformers.masking_utils import create_sliding_window_causal_mask

        config: Any = block.get_submodule("self_attn").config
        if config.sliding_window is None:
            return None
        # By position: transformers 5.24 gives the cache another name.
        mask = create_sliding_window_causal_mask(config, hidden, None, None)
        assert mask is None or isinstance(mask, Tensor), "a block of this project runs with sdpa"
        return mask


MISTRAL = Mistral("mistral.modeling_mistral.MistralDecoderLayer", own_head_width=True)
