"""The linears of a quantized checkpoint in vLLM: names as on disk, cut over tensor-parallel ranks while they load.

vLLM fuses q, k, v and gate, up; that is just what an input group is. What belongs to the group's input is a submodule
`group` of the fused linear. Where the router of a group reads another group's input, that group chooses the experts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import get_world_group
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import QuantizationConfig, register_quantization_config
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import BasevLLMParameter, ModelWeightParameter, RowvLLMParameter

from qe_dist import archs
from qe_dist.archs.base import EngineNames
from qe_dist.core.layout import METHOD, BlockLayout, GroupLayout, Layout
from qe_dist.core.quantized import input_from_tensors, repair_from_tensors
from qe_dist.numerics.sharding import inputs_dim, local_channels, outputs_dim, why_not
from qe_dist.serve.format import check_files
from qe_dist.serve.group import Group, backend

INPUT = "group"


@register_quantization_config(METHOD)
class QEConfig(QuantizationConfig):
    """The `quantization_config` of our checkpoints."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.methods: dict[str, QELinearMethod] = {}
        """The method of each group, by its name in the model."""
        self.names: EngineNames

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QEConfig":
        return cls(Layout.from_json(config))

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """What belongs to the input of a group goes into the fused linear that reads it. Applied by a model and by each
        model within it, so that new names must not look like old ones."""
        modules = {**self.names.modules, **self.names.loaded_as}.items()
        return WeightsMapper(orig_to_new_substr={f".{group}_input.": f".{name}.{INPUT}." for group, name in modules})

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM calls it once it knows the model, before it makes a layer or reads a weight."""
        self.names = archs.for_engine(hf_config.model_type).in_vllm

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        found = self.find(prefix)
        if found is None:
            return UnquantizedLinearMethod()
        if not self.methods and get_world_group().local_rank == 0:  # once for each host, before the first weight
            check_files(Path(get_current_vllm_config().model_config.model))
        block, group, layout = found
        method = self.methods[block + group] = QELinearMethod(block + group, layout.groups[group])
        if layout.groups[group].routed:
            method.source = self.methods[block + layout.groups[group].router_input]
        return method

    def find(self, prefix: str) -> tuple[str, str, BlockLayout] | None:
        """Prefix of the block, name of the group in it, and layout of the block of a fused linear that is quantized."""
        blocks = f"{self.names.blocks}."
        index, _, name = prefix.removeprefix(blocks).partition(".")
        group = next((group for group, module in self.names.modules.items() if module == name), None)
        if not prefix.startswith(blocks) or group is None:
            return None
        layout = self.layout.blocks[int(index)]
        return (f"{blocks}{index}.", group, layout) if group in layout.groups else None


@register_weight_loader_v2_supported_method
class QELinearMethod(LinearMethodBase):
    def __init__(self, name: str, layout: GroupLayout) -> None:
        self.name, self.layout, self.scheme = name, layout, layout.scheme
        self.source: QELinearMethod | None = None
        """The method of the group whose input the router reads; None without router."""

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        linears = self.layout.linears
        outputs = {name: specs["weight_scale"].shape[0] for name, specs in linears.items()}
        row, mixed = isinstance(layer, RowParallelLinear), self.layout.rotated_block
        if why := why_not(self.scheme, outputs, input_size, "row" if row else "column", layer.tp_size, mixed):
            raise ValueError(f"{self.name}: {why}; choose another --tensor-parallel-size")
        loader = extra["weight_loader"]
        for name, spec in next(iter(linears.values())).items():
            dim, shape = outputs_dim(name), list(spec.shape)
            if dim is not None:
                shape[dim] = sum(output_partition_sizes)
            self._add(layer, name, spec.torch_dtype, shape, loader, row, len(linears), layer.tp_size)
        part = nn.Module()
        for name, spec in self.layout.input.items():
            self._add(part, name, spec.torch_dtype, list(spec.shape), loader, row, 1, layer.tp_size)
        layer.register_module(INPUT, part)

    def _add(
        self,
        module: nn.Module,
        name: str,
        dtype: torch.dtype,
        shape: list[int],
        loader: Callable,
        row: bool,
        parts: int,
        size: int,
    ) -> None:
        """An empty parameter that knows how it is cut, and how often it has to be loaded."""
        cut = inputs_dim(name, tuple(shape)) if row else None
        if cut is not None:
            shape[cut] //= size
        data = torch.empty(shape, dtype=dtype)
        checked = self._checked(name, loader)
        dim = None if row else outputs_dim(name)
        if cut is not None:
            parameter = RowvLLMParameter(data=data, input_dim=cut, weight_loader=checked)
        elif dim is not None:
            parameter = ModelWeightParameter(data=data, input_dim=data.ndim - 1, output_dim=dim, weight_loader=checked)
        else:
            parameter = BasevLLMParameter(data=data, weight_loader=checked)
        parameter.parts_left = parts
        module.register_parameter(name, parameter)

    def _checked(self, name: str, loader: Callable) -> Callable:
        def load(parameter: BasevLLMParameter, loaded: Tensor, *shard: Any) -> None:
            if loaded.dtype != parameter.dtype:
                raise ValueError(
                    f"{self.name}: {name} is {loaded.dtype}, expected {parameter.dtype}; see qe-dist verify"
                )
            try:
                loader(parameter, loaded, *shard)
            except (AssertionError, RuntimeError) as error:
                raise ValueError(
                    f"{self.name}: {name} of shape {tuple(loaded.shape)} does not fit into {tuple(parameter.shape)} "
                    f"({error}); see qe-dist verify"
                ) from None
            parameter.parts_left -= 1

        return load

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        own = {n: p for n, p in layer.named_parameters(recurse=False) if isinstance(p, BasevLLMParameter)}
        of_input = dict(layer.get_submodule(INPUT).named_parameters())
        for name, parameter in (*own.items(), *of_input.items()):
            if parameter.parts_left > 0:
                raise ValueError(f"{self.name}: the checkpoint lacks {name}; copy it again, or see qe-dist verify")
            if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                raise ValueError(f"{self.name}: {name} has a NaN or Inf; see qe-dist verify")
        width = layer.input_size_per_partition
        tensors = {name: parameter.data for name, parameter in of_input.items()}
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
            tensors = local_channels(tensors, width, layer.tp_rank)
        part = input_from_tensors(tensors)
        if part.by_modality:
            raise ValueError(
                f"{self.name} treats text and image tokens differently ({self.scheme}, scales or experts by "
                "modality), which vLLM's layers do not know; use a recipe without, or serve with transformers"
            )
        run = backend(own["weight_packed"].device, layer.params_dtype)
        self.group = Group(run.Input(part, self.scheme, width))
        if self.source is not None and part.router is not None:
            self.source.group.choose_for(self.group, part.router)
        words, scale = own["weight_packed"].data, own["weight_scale"].data
        repair = repair_from_tensors({name: parameter.data for name, parameter in own.items()})
        self.linear = run.Linear(words, scale, repair, self.scheme, width)
        layer.weight_packed = nn.Parameter(words.new_empty(0), requires_grad=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.linear(self.group.prepare(x.flatten(0, -2)), bias, x.dtype)
        return y.unflatten(0, x.shape[:-1])
