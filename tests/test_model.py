"""What people have on disk under the name of a model: opened as transformers and vLLM will open the result, or refused
in one line that names file, tensor or field."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qe_dist import archs
from qe_dist.core.errors import CheckpointError, ConfigError, QEError
from qe_dist.model import open_model
from tests.tiny import tiny_model

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def model(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "model"))


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def save(model: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, model / name, metadata={"format": "pt"})


def configured(model: Path, change) -> None:
    config = json.loads((model / "config.json").read_text())
    change(config)
    (model / "config.json").write_text(json.dumps(config))


def sharded(model: Path) -> dict[str, str]:
    """Cuts the model into two shards. Returns the index's map."""
    tensors = weights(model)
    names = list(tensors)
    placed = {name: SHARDS[2 * i // len(names)] for i, name in enumerate(names)}
    for shard in SHARDS:
        save(model, {n: t for n, t in tensors.items() if placed[n] == shard}, shard)
    (model / "model.safetensors").unlink()
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return placed


def refusal(place: Path) -> str:
    with pytest.raises(QEError) as error:
        open_model(place)
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 400 + 4 * len(str(place))
    return said


def test_a_model_as_it_is_saved_is_taken_whole(model):
    opened = open_model(model)
    assert set(opened.source.names()) == set(weights(model))
    assert opened.notes == ()
    assert opened.source.config == json.loads((model / "config.json").read_text())


@pytest.mark.parametrize("name", archs.names())
def test_every_family_is_taken_whole_as_it_is_saved(tmp_path, name):
    """With its vision tower, its head, and its blocks; and with a tensor less it is refused."""
    model = tiny_model(tmp_path / "model", name)
    opened = open_model(model)
    tensors = weights(model)
    assert set(opened.source.names()) == set(tensors)
    assert opened.notes == ()
    gone = sorted(n for n in tensors if n != "lm_head.weight")[-1]
    save(model, {n: t for n, t in tensors.items() if n != gone})
    assert f"has no tensor {gone}" in refusal(model)


def test_names_as_they_were_published_are_those_of_today(model):
    def published(name: str) -> str:
        return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")

    save(model, {published(n): t for n, t in weights(model).items()})
    assert not open_model(model).notes


# -- surplus and missing tensors


@pytest.mark.parametrize(
    "surplus",
    ["lora_A.default.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "visual.head.weight", "value_head.bias"],
)
def test_a_surplus_tensor_is_left_out_with_a_line(model, surplus):
    before = weights(model)
    save(model, before | {surplus: torch.ones(4)})
    opened = open_model(model)
    assert set(opened.source.names()) == set(before)
    assert f"{surplus} of {model} is left out" in opened.notes[0]


def test_positions_that_older_versions_saved_are_left_out(model):
    save(model, weights(model) | {"visual.embeddings.position_ids": torch.arange(9)})
    assert "position_ids" not in " ".join(open_model(model).source.names())


def blocks(count: int):
    """A change of a config."""

    def change(config):
        config["text_config"] = {n: v for n, v in config["text_config"].items() if n != "layer_types"}
        config["text_config"]["num_hidden_layers"] = count

    return change


def test_blocks_behind_the_last_one_are_left_out_with_a_line(model):
    configured(model, blocks(1))
    opened = open_model(model)
    assert not [name for name in opened.source.names() if ".layers.1." in name]
    assert "blocks 1 to 1" in opened.notes[0]
    assert "num_hidden_layers 1" in opened.notes[0]


def test_more_blocks_than_there_are_tensors(model):
    configured(model, blocks(3))
    assert "num_hidden_layers is 3, but the files have blocks 0 to 1" in refusal(model)


@pytest.mark.parametrize("lost", ["layers.1.self_attn.o_proj.weight", "visual.merger.mlp.2.bias", "norm.weight"])
def test_a_missing_tensor_is_named_as_the_files_name_others(model, lost):
    tensors = weights(model)
    name = next(n for n in tensors if n.endswith(lost))
    del tensors[name]
    save(model, tensors)
    assert f"has no tensor {name}" in refusal(model)


def test_what_transformers_leaves_unread_goes_along(model, monkeypatch):
    from transformers import Qwen2VLForConditionalGeneration

    monkeypatch.setattr(Qwen2VLForConditionalGeneration, "_keys_to_ignore_on_load_unexpected", {r"^mtp\."})
    save(model, weights(model) | {"mtp.fc.weight": torch.ones(4, 4)})
    opened = open_model(model)
    assert "mtp.fc.weight" in opened.source.names()
    assert "go along unread" in opened.notes[0]


# -- the head


def tied(model: Path, value: bool) -> None:
    configured(model, lambda c: c.update(tie_word_embeddings=value))


def test_untied_without_a_head_is_refused(model):
    save(model, {n: t for n, t in weights(model).items() if n != "lm_head.weight"})
    assert "no lm_head.weight, which its config.json asks for (tie_word_embeddings is false)" in refusal(model)


def test_tied_without_a_head_is_right(model):
    save(model, {n: t for n, t in weights(model).items() if n != "lm_head.weight"})
    tied(model, True)
    assert open_model(model).notes == ()


def test_a_head_that_is_the_tied_embeddings_is_left_out(model):
    tensors = weights(model)
    embeddings = next(n for n in tensors if n.endswith("embed_tokens.weight"))
    save(model, tensors | {"lm_head.weight": tensors[embeddings].clone()})
    tied(model, True)
    opened = open_model(model)
    assert "lm_head.weight" not in opened.source.names()
    assert opened.source.config["tie_word_embeddings"] is True


def test_a_head_that_is_not_the_embeddings_unties_them_with_a_line(model):
    tied(model, True)
    opened = open_model(model)
    assert "lm_head.weight" in opened.source.names()
    assert opened.source.config["tie_word_embeddings"] is False
    assert "tie_word_embeddings is true, but lm_head.weight is not" in opened.notes[0]


def test_tied_embeddings_that_were_saved_as_the_head_alone_are_found(model):
    """As safetensors does it where two names share a tensor; transformers ties the other way round."""
    tensors = weights(model)
    embeddings = next(n for n in tensors if n.endswith("embed_tokens.weight"))
    save(model, {n: t for n, t in tensors.items() if n != embeddings})
    tied(model, True)
    source = open_model(model).source
    assert "lm_head.weight" not in source.names()
    assert torch.equal(source.get(embeddings), tensors["lm_head.weight"])
    assert source.shape(embeddings) == tuple(tensors["lm_head.weight"].shape)


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod.", "model.language_model."])
def test_names_behind_a_prefix_of_a_wrapper_are_recognised(model, prefix):
    save(model, {prefix + n: t for n, t in weights(model).items()})
    assert f"all its names begin with '{prefix}" in refusal(model)


# -- small files


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_small_file_that_is_no_json_is_refused_before_it_is_copied(model, name):
    (model / name).write_text("{")
    assert f"{name} is not JSON" in refusal(model)


def test_an_adapter_beside_a_whole_model(model):
    (model / "adapter_config.json").write_text("{}")
    assert "holds a model and, in adapter_config.json, an adapter" in refusal(model)


def test_a_file_that_may_not_be_read_says_so(model):
    from qe_dist.io.shards import unreadable

    said = str(unreadable("model.safetensors", PermissionError(13, "Permission denied")))
    assert "cannot be read: Permission denied" in said
    assert "truncated" not in said


# -- shards


def test_shards_are_one_model(model):
    before = set(weights(model))
    sharded(model)
    assert set(open_model(model).source.names()) == before


def test_a_single_file_beside_shards_is_refused_since_loaders_would_differ(model):
    shutil.copyfile(model / "model.safetensors", model / "kept")
    sharded(model)
    (model / "kept").rename(model / "model.safetensors")
    assert "both model.safetensors and model.safetensors.index.json" in refusal(model)


def test_shards_without_their_index(model):
    sharded(model)
    (model / INDEX).unlink()
    assert f"{INDEX} is missing, and model-00001-of-00002.safetensors needs it" in refusal(model)


def test_a_stray_shard_is_left_out_with_a_line(model):
    before = set(weights(model))
    sharded(model)
    save(model, {"stray": torch.ones(3)}, "model-00003-of-00002.safetensors")
    opened = open_model(model)
    assert set(opened.source.names()) == before
    assert "model-00003-of-00002.safetensors is not a part of this model" in opened.notes[0]


def test_a_tensor_in_two_shards_must_be_the_same(model):
    placed = sharded(model)
    name = next(n for n, shard in placed.items() if shard == SHARDS[0] and n.endswith("weight"))
    second = load_file(model / SHARDS[1])
    save(model, second | {name: load_file(model / SHARDS[0])[name]}, SHARDS[1])
    assert name in open_model(model).source.names()
    save(model, second | {name: load_file(model / SHARDS[0])[name] + 1}, SHARDS[1])
    assert f"has {name} twice, with different values" in refusal(model)


def test_an_index_that_places_a_tensor_in_another_shard(model):
    placed = sharded(model)
    name = next(n for n, shard in placed.items() if shard == SHARDS[0])
    (model / INDEX).write_text(json.dumps({"weight_map": placed | {name: SHARDS[1]}}))
    assert f"{SHARDS[0]} does: copy the index again" in refusal(model)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000],
)
def test_a_damaged_index(model, content):
    (model / INDEX).write_text(content)
    assert f"{INDEX} is damaged" in refusal(model)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "", "a" * 300, "\ud800"])
def test_an_index_that_points_out_of_the_folder(model, shard):
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    assert "expected a file in the same folder" in refusal(model)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"PK\x03\x04archive/data.pkl", "it is a pickle of PyTorch"),
        (b"GGUF\x03\0\0\0", "it is a GGUF file"),
        (b"", "it has 0 bytes"),
        (b"\x10", "it has 1 bytes"),
        ((2**40).to_bytes(8, "little") + b"{}", "a header of 1099511627776"),
    ],
)
def test_a_file_that_is_no_safetensors_file(model, content, says):
    (model / "model.safetensors").write_bytes(content)
    assert says in refusal(model)


def test_a_link_to_a_blob_that_is_gone(model, tmp_path):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    assert "is a link to" in refusal(model)
    assert "fetch the model again" in refusal(model)


# -- the configuration


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["text_config"].update(vocab_size=500), "(text_config.vocab_size)"),
        (lambda c: c["text_config"].update(intermediate_size=700), "(text_config.intermediate_size)"),
        (lambda c: c["text_config"].update(num_key_value_heads=4), "config.json asks for"),
        (lambda c: c["text_config"].update(layer_types=["full_attention"] * 5), "layer_types has 5 entries"),
        (lambda c: c["text_config"].update(num_hidden_layers="two"), "num_hidden_layers"),
        (blocks(0), "num_hidden_layers must be at least 1"),
        (lambda c: c["text_config"].pop("rope_parameters"), "lacks mrope_section"),
        (lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[2, 2, 2]), "half of the 16 rotary"),
        (lambda c: c["text_config"]["rope_parameters"].update(rope_theta=-1), "rope_theta must be a number above 0"),
        (lambda c: c["vision_config"].update(hidden_act="gelu_of_tomorrow"), "config.json describes no qwen2_vl"),
        (lambda c: c["text_config"].update(hidden_act="gelu_of_tomorrow"), "hidden_act 'gelu_of_tomorrow'"),
        (lambda c: c.update(image_token_id=512), "image_token_id is 512, which is no row"),
        (lambda c: c.update(text_config=[1]), "text_config must be an object"),
        (lambda c: c["text_config"].update(eos_token_id=[2, 600]), "eos_token_id is 600, which is no row"),
        (lambda c: c["text_config"].pop("eos_token_id"), "eos_token_id is missing, for which"),
        (lambda c: c.pop("vision_config"), "has no vision_config"),
        (lambda c: c.update(architectures="Qwen2VL"), "architectures must be a list of names"),
        (lambda c: c.update(dtype=True), "dtype must be a type of torch such as bfloat16"),
        (lambda c: c.update(torch_dtype="bf16"), "torch_dtype must be a type of torch"),
        (lambda c: c.update(model_type=["qwen2_vl"]), "model_type"),
        (lambda c: c.update(model_type="qwen2_v"), "did you mean 'qwen2_vl'?"),
        (lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[[2], 3, 3]), "mrope_section is"),
        (lambda c: c["text_config"].update(num_attention_heads=0), "config.json"),
        (lambda c: c["text_config"].update(hidden_act="a" * 5000), "hidden_act 'aaaa"),
    ],
)
def test_a_config_out_of_step_is_named_by_file_and_field(model, change, says):
    configured(model, change)
    said = refusal(model)
    assert says in said
    assert "config.json" in said


@pytest.mark.parametrize("content", ["", "[1]", '"x"', "{", "\ufeff{}", '{"a": NaN', "[" * 100_000])
def test_a_config_that_is_no_object(model, content):
    (model / "config.json").write_text(content)
    assert "config.json is not" in refusal(model)


def test_a_config_that_says_no_quantization(model):
    configured(model, lambda c: c.update(quantization_config=None))
    assert open_model(model).notes == ()


def test_a_config_without_a_class_gets_one_for_engines(model):
    configured(model, lambda c: c.pop("architectures"))
    opened = open_model(model)
    assert opened.source.config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert "names no architectures" in opened.notes[0]


# -- quantized already


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "mxfp4"])
def test_a_quantized_model_is_refused_by_its_method(model, method):
    configured(model, lambda c: c.update(quantization_config={"quant_method": method}))
    assert f"quantized by {method} already" in refusal(model)


def test_a_model_that_older_tools_quantized_is_known_by_its_tensors_or_files(model):
    (model / "quantize_config.json").write_text("{}")
    assert "quantize_config.json says" in refusal(model)
    save(model, weights(model) | {"model.layers.0.mlp.up_proj.qweight": torch.ones(4, dtype=torch.int32)})
    assert "quantized by GPTQ or AWQ already" in refusal(model)


def test_our_own_checkpoint_is_recognised(model):
    configured(model, lambda c: c.update(quantization_config={"quant_method": "qe"}))
    assert "is a checkpoint that qe-dist made" in refusal(model)


@pytest.mark.parametrize("kind", ["block", "channel", "tensor"])
def test_fp8_is_dequantized_as_its_loaders_do(model, kind):
    """Blocks of 16 x 16, whose last ones are cut off."""
    tensors, exact = weights(model), {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name].float()
        rows, columns = weight.shape
        if kind == "block":
            padded = torch.nn.functional.pad(weight, (0, -columns % 40, 0, -rows % 40))
            scale = padded.reshape(len(padded) // 40, 40, -1, 40).abs().amax((1, 3)) / 448
            wide = scale.repeat_interleave(40, 0).repeat_interleave(40, 1)[:rows, :columns]
        else:
            scale = wide = weight.abs().amax(1, keepdim=True) / 448 if kind == "channel" else weight.abs().max() / 448
        codes = (weight / wide).to(torch.float8_e4m3fn)
        tensors[name], exact[name] = codes, (codes.float() * wide).bfloat16()
        tensors[name + ("_scale_inv" if kind == "block" else "_scale")] = scale
    save(model, tensors)
    said = {"quant_method": "fp8", "weight_block_size": [40, 40]} if kind == "block" else {"quant_method": "fp8"}
    configured(model, lambda c: c.update(quantization_config=said))
    opened = open_model(model)
    assert "quantization_config" not in opened.source.config
    assert not [n for n in opened.source.names() if "scale" in n]
    assert "weights in fp8" in opened.notes[0]
    for name, wanted in exact.items():
        assert torch.equal(opened.source.get(name), wanted)


def test_fp8_without_a_scale_or_with_one_of_another_shape(model):
    tensors = weights(model)
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save(model, tensors)
    configured(model, lambda c: c.update(quantization_config={"quant_method": "fp8"}))
    assert f"has {name} in fp8 and neither" in refusal(model)
    save(model, tensors | {f"{name}_scale_inv": torch.ones(3, 3)})
    assert f"{name}_scale_inv has shape (3, 3)" in refusal(model)


# -- no model at all


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "config.json does not exist"),
        ({"adapter_config.json": '{"base_model_name_or_path": "org/base"}'}, "is a LoRA adapter of org/base"),
        ({"adapter_config.json": "{"}, "is a LoRA adapter"),
        ({"model-q4.gguf": "GGUF"}, "is a GGUF file"),
        ({"onnx.onnx": "x"}, "is an ONNX file"),
        ({"consolidated.00.pth": "x", "params.json": "{}"}, "is a pickle of PyTorch"),
        ({"pytorch_model.bin": "x"}, "save the model again as safetensors"),
        ({"inner/config.json": "{}"}, "did you mean"),
        ({"snapshots/0123abc/config.json": "{}", "refs/main": "0123abc"}, "snapshots/0123abc"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_is(tmp_path, files, says):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert says in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pytorch_model.bin", "is a pickle of PyTorch"),
        ("pytorch_model.bin.index.json", "is a pickle of PyTorch"),
        ("model.gguf", "is a GGUF file"),
        ("adapter_model.safetensors", "there is a LoRA adapter alone"),
        ("model.fp16.safetensors", "is not one of its names"),
        ("tf_model.h5", "is a model of TensorFlow or Flax"),
    ],
)
def test_a_config_beside_weights_of_another_kind(model, name, says):
    (model / "model.safetensors").rename(model / name)
    assert says in refusal(model)


def test_a_file_in_the_place_of_a_folder(model, tmp_path):
    assert f"give the folder of a model, such as {model}" in refusal(model / "model.safetensors")
    (tmp_path / "a.gguf").write_text("GGUF")
    assert "is a GGUF file" in refusal(tmp_path / "a.gguf")


def test_errors_are_of_the_kinds_that_end_a_command(model):
    with pytest.raises(ConfigError):
        open_model(model / "nowhere")
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        open_model(model)
