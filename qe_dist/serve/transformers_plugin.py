"""`quant_method: "qe"` for transformers: from_pretrained, generate, save_pretrained. Registered by importing it."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qe_dist.core.errors import CheckpointError
from qe_dist.core.scheme import Scheme
from qe_dist.serve.format import METHOD, VERSION, check_files, check_version
from qe_dist.serve.linear import QEInput, QELinear
from qe_dist.serve.modality import TokenModality


class QEConfig(QuantizationConfigMixin):
    """The `quantization_config` of our checkpoints (written by io/checkpoint.py)."""

    def __init__(
        self,
        layouts: list[dict[str, Any]],
        block_layouts: list[int],
        version: int = VERSION,
        format: str = "pack-quantized",
        **_: Any,
    ) -> None:
        check_version(version)
        self.quant_method = METHOD
        self.layouts, self.block_layouts = layouts, block_layouts
        self.version, self.format = version, format


class QEQuantizer(HfQuantizer):
    """Replaces the linears of the decoder blocks before the weights are loaded; names equal those on disk."""

    quantization_config: QEConfig
    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if checkpoint_files and os.environ.get("LOCAL_RANK", "0") == "0":  # once for each host
            check_files(Path(checkpoint_files[0]).parent)
        config = self.quantization_config
        blocks = model.get_decoder().layers
        if len(blocks) != len(config.block_layouts):
            raise CheckpointError(
                f"config.json describes {len(config.block_layouts)} quantized blocks, the model has {len(blocks)}"
            )
        modality = TokenModality(model.config)
        for block, index in zip(blocks, config.block_layouts, strict=True):
            replace_linears(block, config.layouts[index], modality)
        if any(isinstance(module, QEInput) and module.by_modality for module in blocks.modules()):
            modality.follow(model.base_model)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        """What is not quantized gets the dtype that was asked for; before 5.20, transformers leaves it as on disk."""
        for module in model.modules():
            own = {"bias"} if isinstance(module, QELinear) else set() if isinstance(module, QEInput) else None
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point() and (own is None or name in own):
                    parameter.data = parameter.data.to(self.dtype)

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def replace_linears(block: nn.Module, layout: dict[str, Any], modality: TokenModality) -> None:
    """Puts empty quantized modules in the place of a block's linears."""
    schemes = {name: Scheme.parse(group["scheme"]) for name, group in layout.items()}
    linears = {name: [block.get_submodule(linear) for linear in group["linears"]] for name, group in layout.items()}
    inputs = {n: QEInput(schemes[n], g["input"], linears[n], modality) for n, g in layout.items()}
    for name, group in layout.items():
        inputs[name].route_on(inputs[group["router_input"]])
        block.set_submodule(f"{name}_input", inputs[name])
        for (linear, shapes), old in zip(group["linears"].items(), linears[name], strict=True):
            block.set_submodule(linear, QELinear(schemes[name], shapes, inputs[name], old))


def register() -> None:
    """Idempotent."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(QEQuantizer)
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(QEConfig)


register()
