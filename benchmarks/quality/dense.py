"""Reads what a peer wrote into a plain model of full-precision values, which every evaluator measures.

write_llama     gives a peer that knows no Qwen2-VL the language model of one whose biases are 0
read_autoround  the weights of AutoRound's checkpoint, as its own layer would compute them
write_dense     the Qwen2-VL with other weights, and with activations rounded per token where the peer rounded them
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

VISION = "visual."


def write_llama(model: Path, folder: Path) -> None:
    """The language model of a Qwen2-VL as a Llama, with its tokenizer. Raises ValueError where a bias is not 0."""
    config = json.loads((model / "config.json").read_text())
    text = config["text_config"]
    rope = {name: value for name, value in text["rope_parameters"].items() if name != "mrope_section"}
    left_out = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "model_type")
    llama = {name: value for name, value in text.items() if name not in left_out}
    llama |= {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_parameters": rope, "attention_bias": False,
        "dtype": config["dtype"], "tie_word_embeddings": config["tie_word_embeddings"],
    }  # fmt: skip
    tensors = {n: t for n, t in _tensors(model).items() if not n.startswith(VISION)}
    if biased := [n for n, t in tensors.items() if n.endswith(".bias") and t.any()]:
        raise ValueError(f"{model}: a Llama has no place for {biased[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    kept = {n: t for n, t in tensors.items() if not n.endswith(".bias")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(llama, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(model / name, folder / name)


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def read_autoround(folder: Path) -> dict[str, Tensor]:
    """Weights of the rounded linears in float32 [O, I] under their names on disk.

    Packed ("auto_round:auto_gptq"): codes are a stream of bits along the inputs, scales are [groups, O], and what is
    stored of a zero point is one less. Not packed ("auto_round:fake", with rounded activations): values.
    """
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = _tensors(folder)
    if quantization["packing_format"] == "auto_round:fake":
        names = [n for n in tensors if ".layers." in n and n.endswith("_proj.weight")]
        return {name: tensors[name].float() for name in names}
    if quantization["packing_format"] not in ("auto_round:auto_gptq", "auto_round"):
        raise ValueError(f"{folder}: cannot read packing_format {quantization['packing_format']!r}")
    off = 1 if "gptq" in quantization["packing_format"] else 0
    weights, bits = {}, quantization["bits"]
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        codes = unpack(tensors[f"{name}.qweight"].T, bits)  # [O, I]
        zeros = unpack(tensors[f"{name}.qzeros"], bits).T + off  # [O, groups]
        size = codes.shape[1] // zeros.shape[1]
        scales = tensors[f"{name}.scales"].T.float()
        weights[f"{name}.weight"] = (codes - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)
    return weights


def unpack(words: Tensor, bits: int) -> Tensor:
    """[R, W] words of 32 bits to [R, W * 32 / bits] numbers, the lowest bits first; a number may span two words."""
    each = (words.contiguous()[..., None] >> torch.arange(32)) & 1
    stream = each.reshape(len(words), -1, bits)
    return (stream << torch.arange(bits)).sum(-1)


def write_dense(model: Path, weights: Mapping[str, Tensor], folder: Path, activation_bits: int | None = None) -> None:
    """The model with these weights, and with its other tensors as they are.

    activation_bits: where given, compressed-tensors rounds the inputs of these linears per token, symmetrically.
    """
    tensors = _tensors(model)
    if unknown := sorted(weights.keys() - tensors.keys()):
        raise ValueError(f"{model} has no {unknown[0]}")
    shutil.copytree(model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors | {n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    if activation_bits is not None:
        activations = {
            "num_bits": activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
        group = {"targets": ["Linear"], "weights": None, "input_activations": activations, "output_activations": None}
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "dense", "quantization_status": "frozen",
            "config_groups": {"decoder": group}, "ignore": ["re:.*visual.*", "lm_head"],
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config, indent=1))
