"""llm-compressor in one process, measured, in a virtual environment of its own (`make peer`); imports nothing of ours.

    .venv-peer/bin/python benchmarks/quality/peer.py MODEL OUTPUT --recipe smoothquant-gptq-w4a8 --calibration FILE

A recipe is a method (METHODS) and a number format, as gptq-w4a8g64. Weights are symmetric, in groups of that size;
without one, in groups of 128 where activations stay in 16 bits, else per output channel. Activations are symmetric and
dynamic, per token. Only the decoder's linears are quantized. FILE holds tokenized samples (`peers.py` writes it):
without torchvision, the transformers that llm-compressor asks for has no image processor.
"""

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from measured import Arguments, Cost
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoTokenizer

IGNORED = ["re:.*visual.*", "lm_head"]
NORMS_AND_DOWN = [
    [["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"], "re:.*input_layernorm$"],
    [["re:.*gate_proj$", "re:.*up_proj$"], "re:.*post_attention_layernorm$"],
    [["re:.*down_proj$"], "re:.*up_proj$"],
]
"""What SmoothQuant smooths by default (the inputs of qkv and gate_up), and the input of down."""

METHODS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    "rtn": lambda scheme: [QuantizationModifier(**scheme)],
    "gptq": lambda scheme: [GPTQModifier(**scheme)],
    "awq": lambda scheme: [AWQModifier(), QuantizationModifier(**scheme)],
    "smoothquant-gptq": lambda scheme: [SmoothQuantModifier(), GPTQModifier(**scheme)],
    "smoothquant-down-gptq": lambda scheme: [SmoothQuantModifier(mappings=NORMS_AND_DOWN), GPTQModifier(**scheme)],
}
"""Every modifier with its own defaults."""


def modifiers(recipe: str) -> list[Any]:
    match = re.fullmatch(r"(?P<method>[a-z-]+)-w(?P<w>\d+)a(?P<a>\d+)(g(?P<g>\d+))?", recipe)
    if match is None or match["method"] not in METHODS:
        raise SystemExit(f"recipe {recipe!r} is not METHOD-wXaY[gZ] with a method of {', '.join(METHODS)}")
    weights: dict[str, Any] = {"num_bits": int(match["w"]), "scale_dtype": "torch.bfloat16"}
    size = match["g"] or ("128" if match["a"] == "16" else None)
    weights |= {"strategy": "group", "group_size": int(size)} if size else {"strategy": "channel"}
    activations = None
    if match["a"] != "16":
        activations = {"num_bits": int(match["a"]), "strategy": "token", "dynamic": True, "observer": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return METHODS[match["method"]]({"config_groups": {"decoder": group}, "ignore": IGNORED})


class _Caught(Exception):
    """Ends the forward when the decoder's input is known."""


def decoder_inputs(model: Any, calibration: Path) -> list[dict[str, Tensor]]:
    """What the decoder reads for every sample, as the model itself makes it.

    llm-compressor traces the model with the first sample and wants the same arguments of all others, which samples
    with and without an image do not have. Embeddings and positions they all have, and what makes them stays as it is.
    """
    found: list[dict[str, Tensor]] = []

    def catch(_module: nn.Module, _args: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
        found.append({name: inputs[name] for name in ("inputs_embeds", "position_ids")})
        raise _Caught

    samples: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(calibration).items():
        index, argument = name.split(".")
        samples.setdefault(index, {})[argument] = tensor
    hook = model.model.language_model.register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        for index in sorted(samples, key=int):
            with contextlib.suppress(_Caught):
                model(**samples[index], use_cache=False)
    hook.remove()
    return found


def quantize(model: Any, folder: Path, samples: list[dict[str, Tensor]], recipe: str) -> None:
    if not torch.cuda.is_available():
        # AWQ pins its cache for copies to an accelerator, and fails where there is none.
        IntermediatesCache.pin_memory = lambda *_, **__: None
    # The processor is only looked at, not used: the samples are tokenized.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = DataLoader(samples, batch_size=None)  # type: ignore[arg-type]
    oneshot(model=model, processor=tokenizer, recipe=modifiers(recipe), dataset=data)


def save(model: Any, output: Path) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("weight_scale"):
            parameter.data = parameter.data.bfloat16()  # scale_dtype has rounded the values, but not the storage
    # Left to itself, it packs nothing once activations are quantized, and stores a byte per weight.
    model.save_pretrained(output, quantization_format="pack-quantized")
    # The names it lists as ignored are those on disk, which a loader looks for among the modules in vain.
    path = output / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = IGNORED
    path.write_text(json.dumps(config, indent=1))


def bits_per_weight(output: Path) -> float:
    """Stored codes, scales and zero points of the quantized linears over their number of weights."""
    stored = weights = 0
    for path in output.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(name)
                if name.endswith((".weight_packed", ".weight_scale", ".weight_zero_point")):
                    stored += tensor.nbytes
                elif name.endswith(".weight_shape"):
                    weights += int(tensor.prod())
    return 8 * stored / weights


def main() -> None:
    asked = Arguments.parse(__doc__)
    torch.set_num_threads(asked.threads)
    cost = Cost()
    with cost.of("load"):
        # In float32, as our calibration on a CPU.
        model = AutoModelForImageTextToText.from_pretrained(asked.model, dtype=torch.float32).eval()
    with cost.of("embed"):
        samples = decoder_inputs(model, asked.calibration)
    with cost.of("oneshot"):
        quantize(model, asked.model, samples, asked.recipe)
    with cost.of("save"):
        save(model, asked.output)
    cost.print(bits_per_weight(asked.output), ("llmcompressor", "compressed-tensors", "torch", "transformers"))


if __name__ == "__main__":
    main()
