"""Models that are not supported are refused with the reason, by their config.json alone."""

import copy
import json
from pathlib import Path

import pytest

from qe_dist import archs
from qe_dist.archs.shared.settings import check_settings
from qe_dist.core.errors import CheckpointError, ConfigError
from tests.tiny import MODELS, tiny_model

SPLIT = dict(archs.get("qwen3_vl").tiny["text_config"]["rope_parameters"]) | {"mrope_interleaved": False}
SPLIT_35 = dict(archs.get("qwen3_5").tiny["text_config"]["rope_parameters"]) | {"mrope_interleaved": False}
ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def test_unknown_model_types_are_refused_with_a_list_and_a_page() -> None:
    listed = ", ".join(archs.names())
    with pytest.raises(ConfigError, match=rf"model_type 'gpt9'; supported are: {listed}.*docs/how/adding-a-model\.md"):
        archs.for_config({"model_type": "gpt9"})
    assert (Path(__file__).parents[2] / archs.GUIDE).exists()


def test_what_is_quantized_already_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantized already"):
        archs.for_config({"model_type": "qwen2_vl", "quantization_config": {}})


def test_code_of_the_model_itself_is_not_run() -> None:
    own = {"auto_map": {"AutoConfig": "configuration_gpt9.GPT9Config"}}
    with pytest.raises(ConfigError, match=r"'gpt9' and needs code of its own \(auto_map\), which is not run"):
        archs.for_config({"model_type": "gpt9"} | own)
    with pytest.raises(ConfigError, match=r"names code of its own \(AutoConfig in auto_map\), which is not run"):
        archs.for_config(dict(archs.get("llama").tiny) | own)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window true"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window true"),
        ("qwen2_vl", {"use_sliding_window": True}, "use_sliding_window true"),
        ("qwen2_5_vl", {"use_sliding_window": True}, "use_sliding_window true"),
        ("qwen3", {"attention_bias": True}, "attention_bias true: vLLM has no bias behind its attention"),
        ("qwen3_vl", {"attention_bias": True}, "attention_bias true"),
        ("qwen3_vl", {"rope_parameters": SPLIT}, "mrope_interleaved false: transformers interleaves all the same"),
        ("qwen3_5", {"rope_parameters": SPLIT_35}, "mrope_interleaved false: transformers interleaves all the same"),
        ("qwen3_5", {"output_gate_type": "sigmoid"}, "output_gate_type 'sigmoid': transformers computes silu"),
        ("qwen3_5", {"attention_bias": True}, "attention_bias true"),
        ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate false: transformers has the gate all the same"),
        (
            "qwen3_5_text",
            {"layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
            "layer_types with 'sliding_attention'",
        ),
        ("llama", {"rope_parameters": ROPE}, "rope_type 'dynamic': its tables depend on the longest sample"),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "supported is LlamaForCausalLM"),
    ],
)
def test_variants_are_refused_by_name(name: str, changes: dict, said: str) -> None:
    config = copy.deepcopy(dict(archs.get(name).tiny))
    check_settings(archs.get(name), config, "there/config.json")
    (config if "architectures" in changes else config.get("text_config", config)).update(changes)
    with pytest.raises(ConfigError, match=f"there/config.json asks for a variant of {name} that is not.*{said}"):
        check_settings(archs.get(name), config, "there/config.json")


def test_what_transformers_takes_for_granted_and_vllm_does_not_must_be_there() -> None:
    config = copy.deepcopy(dict(archs.get("qwen3_vl").tiny))
    del config["text_config"]["rope_parameters"]["mrope_interleaved"]
    with pytest.raises(ConfigError, match="lacks mrope_interleaved, which a qwen3_vl needs"):
        check_settings(archs.get("qwen3_vl"), config, "config.json")


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_tables_that_do_not_depend_on_the_batch_are_supported(kind: str) -> None:
    more = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}}
    rope = ROPE | {"rope_type": kind} | more.get(kind, {})
    check_settings(archs.get("llama"), dict(archs.get("llama").tiny) | {"rope_parameters": rope}, "config.json")


def test_an_image_processor_of_another_model_is_named(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "qwen3_vl")
    other = json.loads((MODELS / "plain" / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match=r"\(patch_size, merge_size\) \(14, 2\), config\.json has \(16, 2\)"):
        archs.get("qwen3_vl").encoder(folder)
