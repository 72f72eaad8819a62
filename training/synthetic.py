"""Qwen2-VL of any size with random weights, written block by block: no more than one block is ever in memory.

    python training/synthetic.py FOLDER --hidden 2048 --intermediate 5504 --blocks 80

Names, shapes and files (shards, index, tokenizer, image processor) are those of a published checkpoint; the vocabulary
is that of the bundled models. Weights keep the variance of what they read, and what writes into the residual stream is
scaled by the depth, so activations stay finite through any number of blocks. Each norm in front of a linear has some
channels with a large gain. Equal seeds give equal tensors, whatever the depth, up to that scale.
"""

import argparse
import json
import math
import shutil
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TOKENIZER = Path(__file__).parents[1] / "models" / "plain"
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")
RESIDUAL = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
OUTLIER_SHARE = 1 / 256
"""Of the channels: those whose gain is OUTLIER_GAIN."""
OUTLIER_GAIN = 20.0


@dataclass(frozen=True)
class Shape:
    """Of the whole model; the width of a head must be a multiple of 16."""

    hidden: int = 1536
    intermediate: int = 8960
    blocks: int = 28
    heads: int = 12
    kv_heads: int = 2
    vocab: int = 512
    vision_blocks: int = 2
    vision_width: int = 128
    vision_heads: int = 4

    def config(self) -> dict[str, Any]:
        """Its `config.json`: that of the bundled models in another size."""
        head = self.hidden // self.heads
        if self.hidden % self.heads or head % 16:
            raise SystemExit(f"hidden {self.hidden} over {self.heads} heads is no multiple of 16")
        config = json.loads((TOKENIZER / "config.json").read_text())
        smallest = config["text_config"]["vocab_size"]
        if self.vocab < smallest:
            raise SystemExit(f"the tokenizer has {smallest} tokens, a vocabulary of {self.vocab} is too small")
        config["text_config"] |= {
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab,
            "max_window_layers": self.blocks, "layer_types": ["full_attention"] * self.blocks,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16],
            },
        }  # fmt: skip
        config["vision_config"] |= {
            "depth": self.vision_blocks, "embed_dim": self.vision_width, "num_heads": self.vision_heads,
            "hidden_size": self.hidden,
        }  # fmt: skip
        return config


def write_model(folder: Path, shape: Shape, seed: int = 0) -> int:
    """Writes the checkpoint, a shard for each block and one for the rest; config.json last, so a folder with a config
    is whole. Returns the bytes of its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, weight_map, total = list(_shards(shape)), {}, 0
    for i, shapes in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: _tensor(n, size, shape.blocks, seed) for n, size in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for name in FILES:
        shutil.copyfile(TOKENIZER / name, folder / name)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    return total


def _shards(shape: Shape) -> Iterator[dict[str, torch.Size]]:
    """Published names and shapes of the tensors of each block, and of all that is in none."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**shape.config()))
    blocks: dict[str, dict[str, torch.Size]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        published = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        owner = published.split(".")[2] if published.startswith("model.layers.") else ""
        blocks[owner][published] = parameter.shape
    yield from blocks.values()


def _tensor(name: str, size: torch.Size, blocks: int, seed: int) -> Tensor:
    """bf16. The name and the seed decide every number."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    values = torch.randn(size, generator=generator)
    if name.endswith(".bias"):
        values *= 0.1
    elif len(size) == 1:
        values = 1 + 0.1 * values
        if "layernorm" in name:
            same = torch.Generator().manual_seed(seed)  # channels in all blocks, as in trained models
            order = torch.randperm(len(values), generator=same)
            values[order[: math.ceil(OUTLIER_SHARE * len(values))]] = OUTLIER_GAIN
    elif "embed_tokens" not in name:
        values /= math.sqrt(math.prod(size[1:]))
    if name.endswith(RESIDUAL):
        values /= math.sqrt(2 * blocks)
    return values.to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    size = write_model(given.folder, Shape(**{f.name: getattr(given, f.name) for f in fields(Shape)}), given.seed)
    print(f"{given.folder}: {size / 2**30:.2f} GiB of weights")


if __name__ == "__main__":
    main()
