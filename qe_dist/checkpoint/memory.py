"""What an evaluation needs of a process's memory, known before it begins."""

import math
from pathlib import Path

import psutil
import torch
from safetensors import safe_open

from qe_dist.core.errors import ConfigError

GIB = 2**30

PROCESS_BYTES = 640 * 2**20
"""Python with torch and transformers, before it has loaded anything."""
BOUND_BYTES = GIB
"""What evaluation adds to a model: a batch's hidden states, logits of some tokens, and a slice of each head."""


def evaluation_bytes(folder: Path, device: str) -> int:
    """Bytes of the host's memory at most: the loaded model (unpacked, in float32 on a CPU) and what evaluating it
    adds."""
    return PROCESS_BYTES + BOUND_BYTES + (model_bytes(folder) if device == "cpu" else stored_bytes(folder))


def check_memory(folder: Path) -> None:
    """ConfigError where this process could not evaluate the model without the system killing it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    needed, free = evaluation_bytes(folder, device), psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"to evaluate {folder} takes a process of {needed / GIB:.1f} GiB, but {free / GIB:.1f} GiB are free; end "
            "what else runs here, or evaluate block by block with --stream"
        )


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def model_bytes(folder: Path) -> int:
    """Bytes of the model in float32. Packed weights count as their codes and what these stand for, low-rank factors
    likewise."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                stored = file.get_slice(name)
                size = math.prod(stored.get_shape())
                if name.endswith(".weight_shape"):
                    total += 5 * math.prod(file.get_tensor(name).tolist())
                elif stored.get_dtype() in ("U8", "I8"):
                    total += 9 * size  # two codes in a byte
                elif stored.get_dtype() != "I32":
                    total += 4 * size
    return total
