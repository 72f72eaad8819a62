"""Qwen2 and Qwen2.5, models of text."""

from qe_dist.archs.base import EngineNames, Family
from qe_dist.archs.decoders.qwen2 import QWEN2
from qe_dist.archs.frontends.text import TextFrontend
from qe_dist.archs.shared.swiglu import FUSED

FAMILY = Family(
    model_types=("qwen2",),
    decoder=QWEN2,
    frontend=TextFrontend(),
    on_disk={"": ("model.",)},
    in_vllm=EngineNames("model.layers", FUSED, "Qwen2ForCausalLM"),
    tiny={
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False,
        **QWEN2.tiny,
    },
)  # fmt: skip
