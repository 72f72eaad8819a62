"""`quant_method: "qe"` for transformers: from_pretrained, generate, save_pretrained. Registered by importing it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qe_dist import archs
from qe_dist.core.errors import CheckpointError
from qe_dist.core.layout import FORMAT, METHOD, VERSIONS, BlockLayout, Layout, check_version
from qe_dist.serve import transformers_tp
from qe_dist.serve.format import check_files
from qe_dist.serve.linear import QEInput, QELinear, submodule
from qe_dist.serve.modality import TokenModality

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QEConfig(QuantizationConfigMixin):
    """The `quantization_config` of our checkpoints as transformers keeps it: raw, for it is written as JSON again."""

    def __init__(
        self,
        layouts: list[dict[str, Any]],
        block_layouts: list[int],
        version: int = VERSIONS[0],
        format: str = FORMAT,
        **_: Any,
    ) -> None:
        check_version(version)
        self.quant_method = METHOD  # type: ignore[assignment]  # hinted as an enumeration of their own methods
        self.layouts, self.block_layouts = layouts, block_layouts
        self.version, self.format = version, format

    @property
    def layout(self) -> Layout:
        return Layout.from_json(vars(self))


class QEQuantizer(HfQuantizer):
    """Replaces the linears of the decoder blocks before the weights are loaded; names equal those on disk."""

    quantization_config: QEConfig
    requires_calibration = True
    cut = False
    """Whether this process has only its part of the model."""
    complete = False
    """Whether every tensor was found."""

    @property
    def layouts(self) -> tuple[BlockLayout, ...]:
        """The layout of every block."""
        return self.quantization_config.layout.blocks

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if checkpoint_files and os.environ.get("LOCAL_RANK", "0") == "0":  # once for each host
            check_files(Path(checkpoint_files[0]).parent)
        blocks, layouts = model.get_decoder().layers, self.layouts
        if len(blocks) != len(layouts):
            raise CheckpointError(f"config.json describes {len(layouts)} quantized blocks, the model has {len(blocks)}")
        asked = getattr(model.config, "distributed_config", None)
        if asked is not None:
            self.cut = transformers_tp.plan(model, layouts, asked)
        frontend = archs.for_checkpoint({"model_type": model.config.model_type}).frontend
        modality = TokenModality(frontend.image_ids(model.config), frontend.modality_argument)
        for block, layout in zip(blocks, layouts, strict=True):
            replace_linears(block, layout, modality)
        if any(isinstance(module, QEInput) and module.by_modality for module in blocks.modules()):
            modality.follow(model.base_model)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._listen(model)

    def _listen(self, model: "PreTrainedModel") -> None:
        """Where transformers would go on with values of its own, and a warning, we do not. It tells what it found to
        this method alone, in all versions that we know; before 5.22, it says nothing of shapes."""
        adjust = model._adjust_missing_and_unexpected_keys

        def check(found: Any) -> None:
            del model._adjust_missing_and_unexpected_keys
            adjust(found)
            shapes = {name: (p.shape, self.shapes.get(name, p.shape)) for name, p in model.named_parameters()}
            shapes |= {name: (own, wanted) for name, own, wanted in found.mismatched_keys}
            found.mismatched_keys.clear()  # or transformers raises an error of its own, without the name
            odd = [f"{n} of shape {tuple(own)}, expected {tuple(w)}" for n, (own, w) in shapes.items() if own != w]
            odd += [f"no {name}" for name in sorted(found.missing_keys)]
            odd += [f"{name}, which the model does not know" for name in sorted(found.unexpected_keys)]
            if odd:
                more = f" (and {len(odd) - 1} more such)" if len(odd) > 1 else ""
                folder = model.config.name_or_path
                raise CheckpointError(f"{folder} has {odd[0]}{more}; copy it again, or see qe-dist verify")
            self.complete = True

        model._adjust_missing_and_unexpected_keys = check  # type: ignore[assignment]  # for this model alone

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> None:
        if not self.complete:
            raise CheckpointError(
                f"transformers {transformers.__version__} does not tell which tensors of {model.config.name_or_path} "
                "it found; give it the folder as qe-dist wrote it, and one of the versions in docs/results/serving.md"
            )
        self._set_dtype(model)
        blocks = model.get_decoder().layers
        prefix = next(name for name, module in model.named_modules() if module is blocks)
        for index, layout in enumerate(self.layouts):
            if self.cut:
                transformers_tp.settle(blocks[index], layout, f"{prefix}.{index}.")
            check_tensors(blocks[index], layout, f"{prefix}.{index}.")
        if any(parameter.is_meta for parameter in blocks.parameters()):
            from qe_dist.serve import offload  # accelerate is there if it has offloaded

            offload.hook_blocks(blocks, prefix)

    def _set_dtype(self, model: nn.Module) -> None:
        """What is not quantized gets the dtype that was asked for; before 5.20, transformers leaves it as on disk."""
        for module in model.modules():
            own = {"bias"} if isinstance(module, QELinear) else set() if isinstance(module, QEInput) else None
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point() and (own is None or name in own):
                    parameter.data = parameter.data.to(self.dtype)

    def is_serializable(self, **_: Any) -> bool:
        return not self.cut

    @property
    def is_trainable(self) -> bool:
        return False


def check_tensors(block: nn.Module, layout: BlockLayout, prefix: str) -> None:
    """CheckpointError for what has another kind of numbers than config.json says, or a NaN or Inf. What is offloaded
    (`meta`) is not looked into."""
    for name, spec in layout.tensors.items():
        found, wanted = block.get_parameter(name), spec.torch_dtype
        if found.dtype != wanted and not (found.is_floating_point() and wanted.is_floating_point):
            raise CheckpointError(f"{prefix}{name} is {found.dtype}, expected {wanted}")
        if found.is_floating_point() and not found.is_meta and not bool(torch.isfinite(found).all()):
            raise CheckpointError(f"{prefix}{name} has a NaN or Inf; see qe-dist verify")


def replace_linears(block: nn.Module, layout: BlockLayout, modality: TokenModality) -> None:
    """Puts empty quantized modules in the place of a block's linears."""
    groups = layout.groups
    linears = {
        name: [submodule(block, linear, nn.Linear) for linear in group.linears] for name, group in groups.items()
    }
    inputs = {n: QEInput(g.scheme, g.input, linears[n], modality) for n, g in groups.items()}
    for name, group in groups.items():
        inputs[name].route_on(inputs[group.router_input])
        block.set_submodule(f"{name}_input", inputs[name])
        for (linear, specs), old in zip(group.linears.items(), linears[name], strict=True):
            block.set_submodule(linear, QELinear(group.scheme, specs, inputs[name], old))


def register() -> None:
    """Idempotent."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(QEQuantizer)
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(QEConfig)


register()
