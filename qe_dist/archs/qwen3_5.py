"""Qwen3.5, 3.6 and 3.8 that are no mixtures of experts (2B to 27B), which see images."""

from qe_dist.archs.base import EngineNames, Family
from qe_dist.archs.decoders.qwen3_5 import FUSED_HERE, LOADED_AS, QWEN3_5
from qe_dist.archs.frontends.qwen2_vl import Qwen35Frontend

_ROPE = dict(QWEN3_5.tiny["rope_parameters"]) | {"mrope_section": [4, 3, 1], "mrope_interleaved": True}

FAMILY = Family(
    model_types=("qwen3_5",),
    decoder=QWEN3_5,
    frontend=Qwen35Frontend(),
    on_disk={"visual.": ("model.visual.",), "language_model.": ("model.language_model.",)},
    in_vllm=EngineNames("language_model.model.layers", FUSED_HERE, "Qwen3_5ForCausalLM", LOADED_AS, "qwen3_5_mtp"),
    tiny={
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": dict(QWEN3_5.tiny) | {"rope_parameters": _ROPE},
        "vision_config": {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 16, "num_position_embeddings": 64,
        },
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4,
        "tie_word_embeddings": False,
    },
    drafts="mtp.",
)  # fmt: skip
