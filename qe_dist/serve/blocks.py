"""The blocks of a model or of one of our checkpoints, each read from its files when its turn comes."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qe_dist.archs.base import BlockLoader, Family, RunBlock
from qe_dist.archs.shared.modules import fill
from qe_dist.core.batch import Batch
from qe_dist.core.errors import ConfigError
from qe_dist.core.source import WeightSource
from qe_dist.io.checkpoint import read_manifest
from qe_dist.io.weights import SafetensorsSource
from qe_dist.serve.format import METHOD, check_files, check_version
from qe_dist.serve.modality import TokenModality
from qe_dist.serve.transformers_plugin import check_tensors, replace_linears


def open_blocks(
    folder: Path, arch: Family, device: str, dtype: torch.dtype
) -> tuple[WeightSource, Sequence[BlockLoader]]:
    """The tensors of a model, and its blocks in their order; each is loaded by calling it.

    ConfigError for a checkpoint that others quantized: what its linears compute, only their own loader knows.
    """
    source = SafetensorsSource(folder, packed=True)
    quantized = source.config.get("quantization_config")
    if quantized is None:
        return source, [partial(_plain, arch, source, spec, device, dtype) for spec in arch.spec(source).blocks]
    if quantized.get("quant_method") != METHOD:
        raise ConfigError(
            f"{folder} was quantized by {quantized.get('quant_method')}, whose blocks only its own loader can run; "
            "leave out --stream"
        )
    check_version(quantized["version"])
    check_files(folder)
    layouts = [quantized["layouts"][i] for i in quantized["block_layouts"]]
    prefixes = [block["prefix"] for block in read_manifest(folder)["blocks"]]
    return source, [
        partial(_quantized, arch, source, i, prefix, layout, device, dtype)
        for i, (prefix, layout) in enumerate(zip(prefixes, layouts, strict=True))
    ]


def _plain(arch: Family, source: WeightSource, spec: Any, device: str, dtype: torch.dtype) -> RunBlock:
    return partial(arch.run_block, arch.block(source, spec, device, dtype))


def _quantized(
    arch: Family,
    source: WeightSource,
    index: int,
    prefix: str,
    layout: Mapping[str, Any],
    device: str,
    dtype: torch.dtype,
) -> RunBlock:
    modality = TokenModality()  # a batch tells it
    block = arch.empty_block(source.config, index)
    replace_linears(block, dict(layout), modality)
    modules = {f"{n}_input": g["input"] for n, g in layout.items()} | {
        n: shapes for g in layout.values() for n, shapes in g["linears"].items()
    }
    packed = {f"{module}.{tensor}" for module, shapes in modules.items() for tensor in shapes}
    disk = {name: prefix + name for name, _ in block.named_parameters()}
    fill(block, source, disk, device, dtype, packed)
    check_tensors(block, dict(layout), prefix)

    def run(batch: Batch) -> Tensor:
        with modality.during(batch.modality):
            return arch.run_block(block, batch)

    return run
