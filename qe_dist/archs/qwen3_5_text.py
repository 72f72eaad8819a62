"""The language model of Qwen3.5 by itself."""

from qe_dist.archs.base import EngineNames, Family
from qe_dist.archs.decoders.qwen3_5 import FUSED_HERE, LOADED_AS, QWEN3_5
from qe_dist.archs.frontends.text import TextFrontend

FAMILY = Family(
    model_types=("qwen3_5_text",),
    decoder=QWEN3_5,
    frontend=TextFrontend(),
    on_disk={"": ("model.", "model.language_model.")},
    in_vllm=EngineNames("model.layers", FUSED_HERE, "Qwen3_5ForCausalLM", LOADED_AS, "qwen3_5_mtp"),
    tiny={
        "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "tie_word_embeddings": False,
        **QWEN3_5.tiny,
    },
    drafts="mtp.",
)  # fmt: skip
