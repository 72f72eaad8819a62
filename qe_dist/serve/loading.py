"""A model or checkpoint for measuring: float32 on CPU, so that only quantization differs, bf16 on a GPU."""

from pathlib import Path
from typing import Any

import torch

from qe_dist import archs
from qe_dist.archs.base import Family
from qe_dist.core.errors import CheckpointError, QEError
from qe_dist.io.dequantized import has_fp8, quantization
from qe_dist.io.weights import SafetensorsSource
from qe_dist.model import Model, open_model
from qe_dist.serve.registration import register_on_import


def check_loadable(folder: Path) -> tuple[Family, Model | None]:
    """The architecture of a model or checkpoint, and the model, opened, where it is one in full precision or in fp8.

    Reads headers. Raises ConfigError or CheckpointError for what could not be quantized either.
    """
    stored = SafetensorsSource(folder)
    arch = archs.for_checkpoint(stored.config)
    plain = quantization(stored.config) is None or has_fp8(stored)
    return arch, open_model(folder) if plain else None


def load_model(folder: Path) -> Any:
    """The Hugging Face model in `folder`, quantized by us or not, ready to run. Raises as `check_loadable` does, before
    anything is loaded."""
    register_on_import()
    arch, opened = check_loadable(folder)
    gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {"dtype": torch.bfloat16 if gpu else torch.float32, "output_loading_info": True}
    try:
        if opened is not None:
            model, found = _in_full_precision(opened, folder, settings)
        else:
            model, found = arch.auto_class().from_pretrained(folder, **settings)
    except QEError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from None
    if missing := sorted(found["missing_keys"]):  # transformers would make them up
        raise CheckpointError(f"{folder} lacks {missing[0]} (and {len(missing) - 1} more); copy it again, or verify it")
    return model.to("cuda" if gpu else "cpu").eval()


def _in_full_precision(opened: Model, folder: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The model, and what the loader of transformers says of it. In the place of fp8 weights it is given what they
    stand for, since its own loader for them wants a GPU."""
    source, auto = opened.source, opened.arch.auto_class()
    if isinstance(source.files, SafetensorsSource):
        return auto.from_pretrained(folder, **settings)
    config = opened.arch.hf_config(source.config)
    tensors = {name: source.get(name) for name in source.names()}
    return auto._model_mapping[type(config)].from_pretrained(None, config=config, state_dict=tensors, **settings)
