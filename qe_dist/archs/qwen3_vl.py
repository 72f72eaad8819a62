"""Qwen3-VL that is not a mixture of experts (2B, 4B, 8B, 32B)."""

from qe_dist.archs.base import EngineNames, Family
from qe_dist.archs.decoders.qwen3 import QWEN3_VL
from qe_dist.archs.frontends.qwen2_vl import Qwen3VLFrontend
from qe_dist.archs.shared.swiglu import FUSED

FAMILY = Family(
    model_types=("qwen3_vl",),
    decoder=QWEN3_VL,
    frontend=Qwen3VLFrontend(),
    on_disk={"visual.": ("model.visual.",), "language_model.": ("model.language_model.",)},
    in_vllm=EngineNames("language_model.model.layers", FUSED, "Qwen3ForCausalLM"),
    tiny={
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": dict(QWEN3_VL.tiny)
        | {
            "head_dim": 24, "num_hidden_layers": 3,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 3, 3], "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4,
        "tie_word_embeddings": False,
    },
)  # fmt: skip
