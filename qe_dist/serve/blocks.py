"""The blocks of a model or of one of our checkpoints, each read from its files when its turn comes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qe_dist.archs.base import BlockLoader, Family, RunBlock
from qe_dist.archs.shared.modules import fill
from qe_dist.core.batch import Batch
from qe_dist.core.errors import ConfigError
from qe_dist.core.layout import METHOD, BlockLayout, Layout
from qe_dist.core.source import WeightSource
from qe_dist.io.checkpoint import read_manifest
from qe_dist.io.dequantized import quantization
from qe_dist.io.weights import SafetensorsSource
from qe_dist.model import open_model
from qe_dist.serve.format import check_files
from qe_dist.serve.modality import TokenModality
from qe_dist.serve.transformers_plugin import check_tensors, replace_linears


def open_blocks(
    folder: Path, arch: Family, device: str, dtype: torch.dtype
) -> tuple[WeightSource, Sequence[BlockLoader]]:
    """The tensors of a model, and its blocks in their order; each is loaded by calling it.

    ConfigError for a checkpoint that others quantized: what its linears compute, only their own loader knows.
    """
    source: WeightSource = SafetensorsSource(folder)
    said = quantization(source.config)
    if said is None or said.get("quant_method") != METHOD:
        try:
            source = open_model(folder).source
        except ConfigError as error:
            own = "; blocks of others only their own loader can run: leave out --stream" if said else ""
            raise ConfigError(f"{error}{own}") from None
        return source, [partial(_plain, arch, source, spec, device, dtype) for spec in arch.spec(source).blocks]
    layout = Layout.from_json(said)
    check_files(folder)
    blocks = zip(read_manifest(folder).blocks, layout.blocks, strict=True)
    return source, [partial(_quantized, arch, source, b.index, b.prefix, one, device, dtype) for b, one in blocks]


def _plain(arch: Family, source: WeightSource, spec: Any, device: str, dtype: torch.dtype) -> RunBlock:
    return partial(arch.run_block, arch.block(source, spec, device, dtype), index=spec.index)


def _quantized(
    arch: Family,
    source: WeightSource,
    index: int,
    prefix: str,
    layout: BlockLayout,
    device: str,
    dtype: torch.dtype,
) -> RunBlock:
    modality = TokenModality()  # a batch tells it
    block = arch.empty_block(source.config, index)
    replace_linears(block, layout, modality)
    disk = {name: prefix + name for name, _ in block.named_parameters()}
    fill(block, source, disk, device, dtype, set(layout.tensors))
    check_tensors(block, layout, prefix)

    def run(batch: Batch) -> Tensor:
        with modality.during(batch.modality):
            return arch.run_block(block, batch, index)

    return run
