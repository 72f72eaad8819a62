"""The tensors of a model that drafts tokens, as published models of Qwen3.5 have them."""

from collections.abc import Mapping
from typing import Any

from qe_dist.archs.base import Family


def draft_shapes(arch: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """By name: a block with attention, what joins embedding and hidden states in front of it, and norms."""
    text = arch.text(config)
    index, hidden = text.layer_types.index("full_attention"), text.hidden_size
    block = {f"layers.0.{n}": tuple(p.shape) for n, p in arch.empty_block(config, index).named_parameters()}
    norms = dict.fromkeys(("norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight"), (hidden,))
    return {f"{arch.drafts}{n}": shape for n, shape in (block | norms | {"fc.weight": (hidden, 2 * hidden)}).items()}
