"""Qwen3, models of text that are not mixtures of experts."""

from qe_dist.archs.base import EngineNames, Family
from qe_dist.archs.decoders.qwen3 import QWEN3
from qe_dist.archs.frontends.text import TextFrontend
from qe_dist.archs.shared.swiglu import FUSED

FAMILY = Family(
    model_types=("qwen3",),
    decoder=QWEN3,
    frontend=TextFrontend(),
    on_disk={"": ("model.",)},
    in_vllm=EngineNames("model.layers", FUSED, "Qwen3ForCausalLM"),
    tiny={
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 24, "tie_word_embeddings": False,
        **QWEN3.tiny,
    },
)  # fmt: skip
