"""Whether vLLM looks for the tensors of a checkpoint where our plug-in has them, by the names that vLLM's own model
maps. Imports the class of the model; makes none."""

from pathlib import Path
from typing import Any

from vllm.model_executor.models.registry import ModelRegistry

from qe_dist import archs
from qe_dist.archs.base import EngineNames
from qe_dist.core.layout import BlockLayout, Layout
from qe_dist.io.checkpoint import INDEX, read_manifest
from qe_dist.io.publish import read_json
from qe_dist.serve.vllm_linear import INPUT, QEConfig


def name_faults(folder: Path) -> list[str]:
    """A line for every tensor of a finished checkpoint that vLLM would take for something else. ConfigError where vLLM
    has no such model."""
    config = read_json(folder / "config.json")
    layout, arch = Layout.from_json(config["quantization_config"]), archs.for_checkpoint(config)
    names = arch.in_vllm
    plugin = QEConfig(layout)
    plugin.names = names
    whole, decoder = (ModelRegistry.models[n].load_model_cls() for n in (config["architectures"][0], names.decoder))
    model = _Names(whole, decoder, plugin)
    places: dict[str, str] = {}
    for block, own in zip(read_manifest(folder).blocks, layout.blocks, strict=True):
        places |= _places(block.prefix, f"{names.blocks}.{block.index}.", own, names)
    faults = []
    for name in read_json(folder / INDEX)["weight_map"]:
        if arch.drafts and name.startswith(arch.drafts):  # of a model of its own
            continue
        found, wanted = model.module(name), places.get(name.rpartition(".")[0])
        if wanted is not None and found != wanted:
            faults.append(f"{name}: vLLM takes it for a tensor of {found}, expected {wanted}")
        elif wanted is None and (found is None or plugin.find(found)):
            faults.append(f"{name}: vLLM takes it for a tensor of {found or 'nothing'}, but it is not quantized")
    return faults


def _places(prefix: str, place: str, layout: BlockLayout, names: EngineNames) -> dict[str, str]:
    """Every module of a block that is quantized, by its name on disk -> the module of vLLM that has its tensors."""
    found: dict[str, str] = {}
    for group, own in layout.groups.items():
        module = f"{place}{names.modules[group]}"
        found |= {f"{prefix}{linear}": module for linear in own.linears}
        found[f"{prefix}{group}_input"] = f"{module}.{INPUT}"
    return found


class _Names:
    """What a model of vLLM calls things."""

    def __init__(self, whole: Any, decoder: Any, plugin: QEConfig) -> None:
        self.mapper = plugin.get_checkpoint_weight_mapper() | whole.hf_to_vllm_mapper
        self.fused = {part: name for name, parts in decoder.packed_modules_mapping.items() for part in parts}

    def module(self, name: str) -> str | None:
        """What vLLM calls a tensor on disk; None for one that it drops."""
        mapped = self.mapper.map_name(name)
        if mapped is None:
            return None
        return ".".join(self.fused.get(part, part) for part in mapped.split(".")[:-1])
