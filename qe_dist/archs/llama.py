"""Llama and models of its shape, such as SmolLM2."""

from qe_dist.archs.base import EngineNames, Family
from qe_dist.archs.decoders.llama import LLAMA
from qe_dist.archs.frontends.text import TextFrontend
from qe_dist.archs.shared.swiglu import FUSED

FAMILY = Family(
    model_types=("llama",),
    decoder=LLAMA,
    frontend=TextFrontend(),
    on_disk={"": ("model.",)},
    in_vllm=EngineNames("model.layers", FUSED, "LlamaForCausalLM"),
    tiny={
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 24, "tie_word_embeddings": False,
        **LLAMA.tiny,
    },
)  # fmt: skip
