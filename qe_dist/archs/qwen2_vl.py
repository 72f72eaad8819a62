"""Qwen2-VL (2B, 7B, 72B)."""

from qe_dist.archs.base import EngineNames, Family
from qe_dist.archs.decoders.qwen2 import QWEN2_VL
from qe_dist.archs.frontends.qwen2_vl import Qwen2VLFrontend
from qe_dist.archs.shared.swiglu import FUSED

FAMILY = Family(
    model_types=("qwen2_vl",),
    decoder=QWEN2_VL,
    frontend=Qwen2VLFrontend(),
    on_disk={  # as published; newer saves have the second
        "visual.": ("visual.", "model.visual."),
        "language_model.": ("model.", "model.language_model."),
    },
    in_vllm=EngineNames("language_model.model.layers", FUSED, "Qwen2ForCausalLM"),
    tiny={
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "text_config": dict(QWEN2_VL.tiny)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4,
        "tie_word_embeddings": False,
    },
)  # fmt: skip
