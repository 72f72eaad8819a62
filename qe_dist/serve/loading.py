"""A model or checkpoint for measuring: float32 on CPU, so that only quantization differs, bf16 on a GPU."""

from pathlib import Path
from typing import Any

import torch

from qe_dist import archs
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.io.publish import read_json
from qe_dist.serve.registration import register_on_import


def load_model(folder: Path) -> Any:
    """The Hugging Face model in `folder`, quantized by us or not, ready to run."""
    register_on_import()
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds no config.json; give a model or a finished checkpoint")
    whole = archs.for_checkpoint(read_json(folder / "config.json")).auto_class()
    gpu = torch.cuda.is_available()
    try:
        model, found = whole.from_pretrained(
            folder, dtype=torch.bfloat16 if gpu else torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from None
    if missing := sorted(found["missing_keys"]):  # transformers would make them up
        raise CheckpointError(f"{folder} lacks {missing[0]} (and {len(missing) - 1} more); copy it again, or verify it")
    return model.to("cuda" if gpu else "cpu").eval()
