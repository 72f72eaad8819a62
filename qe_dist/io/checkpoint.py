"""The checkpoint on disk: tensors of a block, config.json, index and manifest (docs/how/architecture.md)."""

import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qe_dist.core.errors import CheckpointError, TemporaryFileError
from qe_dist.core.layout import BlockLayout, GroupLayout, Layout, TensorSpec
from qe_dist.core.manifest import FittedBlock, Manifest
from qe_dist.core.quantized import (
    QuantizedGroup,
    QuantizedLinear,
    input_from_tensors,
    input_tensors,
    repair_from_tensors,
    repair_tensors,
)
from qe_dist.core.scheme import ARITHMETICS
from qe_dist.core.source import WeightSource
from qe_dist.core.spec import BlockSpec, ModelSpec
from qe_dist.io.integrity import settings_digest
from qe_dist.io.padded import PaddedSource
from qe_dist.io.publish import json_bytes, publish, publish_json, read_json
from qe_dist.io.run_dir import RunDir
from qe_dist.io.weights import upper_bytes
from qe_dist.numerics.packing import pack, unpack

INDEX = "model.safetensors.index.json"
PART_BYTES = 2**30
"""Bytes of one file of tensors outside the blocks; a larger tensor has a file of its own."""
MANIFEST = "qe_manifest.json"
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "generation_config.json", "LICENSE",
)  # fmt: skip


def copied_files(folder: Path) -> list[str]:
    """The files beside the tensors that a checkpoint takes over: COPIED, and named chat templates."""
    named = sorted(path.relative_to(folder).as_posix() for path in folder.glob("additional_chat_templates/*.jinja"))
    return [name for name in COPIED if (folder / name).exists()] + named


def linear_tensors(linear: QuantizedLinear, bits: int) -> dict[str, Tensor]:
    """A linear's tensors by their names within it."""
    shape = torch.tensor(linear.codes.shape, dtype=torch.int64)
    base = {
        "weight_packed": pack(linear.codes, bits),
        "weight_scale": linear.scale,
        "weight_shape": shape,
    }
    return base | repair_tensors(linear)


def block_tensors(spec: BlockSpec, groups: Mapping[str, QuantizedGroup], source: WeightSource) -> dict[str, Tensor]:
    """Everything that a block's file holds, by full name."""
    tensors = {spec.prefix + name: source.get(spec.prefix + name) for name in spec.others}
    for group in spec.groups:
        done = groups[group.name]
        for name, tensor in input_tensors(done.input).items():
            tensors[f"{spec.prefix}{group.module}.{name}"] = tensor
        for linear in group.linears:
            quantized = done.linears[linear.name]
            for name, tensor in linear_tensors(quantized, done.scheme.weight_bits).items():
                tensors[f"{spec.prefix}{linear.name}.{name}"] = tensor
            if linear.bias:
                bias = f"{spec.prefix}{linear.name}.bias"
                tensors[bias] = source.get(bias)
    return tensors


def finished_groups(run: RunDir, spec: BlockSpec) -> dict[str, QuantizedGroup]:
    """The groups of a finished block, as they were published. spec: with the groups that it was fitted in."""
    name = run.block_name(spec.index)
    tensors, said = load_file(run.place(name)), BlockLayout.from_json(run.block_report(spec.index)["layout"])

    def of(module: str) -> dict[str, Tensor]:
        prefix = f"{spec.prefix}{module}."
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    groups = {}
    for group in spec.groups:
        scheme = said.groups[group.name].scheme
        linears = {x.name: _linear(of(x.name), scheme.weight_bits, x.in_features) for x in group.linears}
        groups[group.name] = QuantizedGroup(scheme, input_from_tensors(of(group.module)), linears)
    return groups


def _linear(tensors: Mapping[str, Tensor], bits: int, columns: int) -> QuantizedLinear:
    codes = unpack(tensors["weight_packed"], bits, columns)
    repair = repair_from_tensors({n: t for n, t in tensors.items() if n != "bias"})
    return QuantizedLinear(codes, tensors["weight_scale"], **repair)


def layout(spec: BlockSpec, groups: Mapping[str, QuantizedGroup], tensors: Mapping[str, Tensor]) -> BlockLayout:
    """Shapes and types of a block's tensors, so that a loader can make empty modules for them."""

    def described(module: str) -> dict[str, TensorSpec]:
        prefix = f"{spec.prefix}{module}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        return {n: TensorSpec.of(t) for n, t in sorted(own.items()) if n != "bias"}

    return BlockLayout({
        g.name: GroupLayout(
            groups[g.name].scheme, g.router_input, described(g.module), {x.name: described(x.name) for x in g.linears}
        )
        for g in spec.groups
    })  # fmt: skip


def passthrough_parts(spec: ModelSpec, source: WeightSource) -> dict[str, tuple[str, ...]]:
    """Embeddings, vision tower, final norm and head: name of a file -> names of the tensors in it."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in spec.passthrough:
        size += upper_bytes(source, [name])
        if parts[-1] and size > PART_BYTES:
            parts.append([])
            size = upper_bytes(source, [name])
        parts[-1].append(name)
    return {f"passthrough-{i:05d}": tuple(part) for i, part in enumerate(parts, 1) if part}


def put_passthrough(run: RunDir, spec: ModelSpec, source: WeightSource) -> None:
    """Takes over as they are the parts that are not there yet. Peak memory: one part."""
    for name, tensors in passthrough_parts(spec, source).items():
        if not run.has_file(name):
            run.put_file(name, {t: source.get(t) for t in tensors}, {})


def assemble(
    run: RunDir,
    spec: ModelSpec,
    source: WeightSource,
    recipe: Mapping[str, Any],
    run_info: Mapping[str, Any],
    left_out: Sequence[str] = (),
) -> None:
    """Renames the finished files into place and writes index, manifest and, last of all, config.json.

    left_out: calibration samples that were not used, each with the reason.

    Reads the reports alone, whatever the size of the model.
    """
    run.refresh()
    blocks = {run.block_name(b.index): run.block_report(b.index) for b in spec.blocks}
    parts = {name: run.file_report(name) for name in passthrough_parts(spec, source)}
    weight_map: dict[str, str] = {}
    files: dict[str, str] = {}
    tensors: dict[str, Mapping[str, str]] = {}
    for name, report in {**blocks, **parts}.items():
        file = f"{name}.safetensors"
        files[file], tensors[file] = report["sha256"], report["tensors"]
        weight_map |= dict.fromkeys(report["tensors"], file)
        _move_up(run, name, report["bytes"])
    size = sum(report["bytes"] for report in (*blocks.values(), *parts.values()))
    publish_json(
        run.output / INDEX,
        {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))},
    )
    copied = copied_files(source.folder)
    for name in copied:
        (run.output / name).parent.mkdir(exist_ok=True)
        publish(run.output / name, partial(shutil.copyfile, source.folder / name))
    quantized = Layout(tuple(BlockLayout.from_json(report["layout"]) for report in blocks.values())).to_json()
    config = {**source.config, "quantization_config": quantized}
    model, original, padding = spec, source, None
    if isinstance(source, PaddedSource):
        model, original, padding = source.model, source.source, (source.before, source.width)
    reports = zip(spec.blocks, blocks.values(), strict=True)
    fitted = tuple(FittedBlock.from_json({**report, "prefix": block.prefix}) for block, report in reports)
    others = [run.output / name for name in (*files, INDEX, *copied) if (run.output / name).exists()]
    manifest = Manifest(
        recipe=recipe,
        run=run_info,
        quantization_config=settings_digest(quantized),
        files=files,
        tensors=tensors,
        padding=padding,
        arithmetic=arithmetic_of(fitted),
        **cost_per_weight(model, fitted),
        parameters=num_parameters(model, original),
        fallbacks={k: v for report in blocks.values() for k, v in report["fallbacks"].items()},
        blocks=fitted,
        left_out=left_out,
        checkpoint_bytes=sum(path.stat().st_size for path in others) + len(json_bytes(config)),
    )
    publish_json(run.output / MANIFEST, _with_its_own_bytes(manifest).to_json())
    publish_json(run.output / "config.json", config)


def num_parameters(spec: ModelSpec, source: WeightSource) -> int:
    """The number of parameters of a whole model, quantized or not, with biases and norms."""
    names = [b.prefix + name for b in spec.blocks for name in b.others]
    biases = sum(x.out_features for b in spec.blocks for g in b.groups for x in g.linears if x.bias)
    others = sum(math.prod(source.shape(name)) for name in (*names, *spec.passthrough))
    return sum(block.num_weights for block in spec.blocks) + biases + others


def _with_its_own_bytes(manifest: Manifest) -> Manifest:
    """The manifest, whose `checkpoint_bytes` are those of all other files, with its own added to them."""
    total, others = 0, manifest.checkpoint_bytes
    while total != manifest.checkpoint_bytes:
        total = manifest.checkpoint_bytes
        manifest = replace(manifest, checkpoint_bytes=others + len(json_bytes(manifest.to_json())))
    return manifest


def cost_per_weight(spec: ModelSpec, blocks: Iterable[FittedBlock]) -> dict[str, Any]:
    """Everything stored for the quantized linears, padding included, what one token reads of it, and its
    multiplications, over the number of weights of the model as it was; these also by what executes them."""
    groups = [group for block in blocks for group in block.groups.values()]
    weights = sum(block.num_weights for block in spec.blocks)
    macs = {name: sum(g.macs[name] for g in groups) / weights for name in ARITHMETICS}
    return {
        "bits_per_weight": 8 * sum(g.bytes for g in groups) / weights,
        "active_bits_per_weight": 8 * sum(g.active_bytes for g in groups) / weights,
        "macs_per_weight": sum(macs.values()),
        "macs_by_arithmetic": macs,
    }


def arithmetic_of(blocks: Iterable[FittedBlock]) -> str:
    """What the products of all blocks execute: `int8` or `a16`; `a16 and int8` where blocks differ, whose groups in the
    manifest say which."""
    found = {group.arithmetic for block in blocks for group in block.groups.values()}
    return " and ".join(name for name in ARITHMETICS if name in found)


def report_dict(spec: BlockSpec, groups: Mapping[str, QuantizedGroup], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A block's line in the manifest, and what only its own report has: layout and seconds, which differ every time."""
    reports = {name: group.report for name, group in groups.items()}
    return {
        "index": spec.index,
        "groups": {name: report.to_json() for name, report in reports.items() if report},
        "fallbacks": {f"{spec.prefix}{n}": list(r.fallbacks) for n, r in reports.items() if r and r.fallbacks},
        "layout": layout(spec, groups, tensors).to_json(),
        "fit_seconds": sum(r.seconds for r in reports.values() if r),
    }


def _move_up(run: RunDir, name: str, size: int) -> None:
    """Already moved where an earlier assemble was interrupted."""
    found = run.place(name)
    if not found.exists() or found.stat().st_size != size:
        said = f"has {found.stat().st_size} bytes, expected {size}" if found.exists() else "is missing"
        run.forget_file(name)
        raise TemporaryFileError(
            f"{found} {said}; every worker must see the same {run.output} (a shared file system). "
            "Type the same command again to have it made anew"
        )
    os.replace(found, run.output / found.name)


def read_manifest(folder: Path) -> Manifest:
    """CheckpointError where it is damaged, or written by an earlier version."""
    said = read_json(folder / MANIFEST)
    try:
        return Manifest.from_json(said)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from None
