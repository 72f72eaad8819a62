"""Mistral, with sliding windows (v0.1) and without."""

from qe_dist.archs.base import EngineNames, Family
from qe_dist.archs.decoders.mistral import MISTRAL
from qe_dist.archs.frontends.text import TextFrontend
from qe_dist.archs.shared.swiglu import FUSED

FAMILY = Family(
    model_types=("mistral",),
    decoder=MISTRAL,
    frontend=TextFrontend(),
    on_disk={"": ("model.",)},
    in_vllm=EngineNames("model.layers", FUSED, "MistralForCausalLM"),
    tiny={
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "head_dim": 24, "sliding_window": 16,
        "tie_word_embeddings": False,
        **MISTRAL.tiny,
    },
)  # fmt: skip
