"""The checkpoint on disk: tensors of a block, config.json, index and manifest (DESIGN section 5)."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qe_dist.core.errors import CheckpointError
from qe_dist.core.quantized import (
    QuantizedGroup,
    QuantizedLinear,
    input_tensors,
    repair_tensors,
)
from qe_dist.core.source import WeightSource
from qe_dist.core.spec import BlockSpec, ModelSpec
from qe_dist.io.run_dir import RunDir, publish, publish_json, publish_tensors, sha256
from qe_dist.numerics.packing import pack

PASSTHROUGH = "passthrough.safetensors"
MANIFEST = "qe_manifest.json"
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "generation_config.json", "LICENSE",
)  # fmt: skip


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


def layout(spec: BlockSpec, groups: Mapping[str, QuantizedGroup]) -> dict[str, Any]:
    """Shapes and types of a block's tensors, so that a loader can make empty modules for them."""

    def described(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {n: [str(t.dtype).removeprefix("torch."), *t.shape] for n, t in sorted(tensors.items())}

    modules = {}
    for group in spec.groups:
        done = groups[group.name]
        modules[group.name] = {
            "router_input": group.router_input,
            "input": described(input_tensors(done.input)),
            "linears": {
                x.name: described(linear_tensors(done.linears[x.name], done.scheme.weight_bits)) for x in group.linears
            },
        }
    return modules


def put_passthrough(run: RunDir, spec: ModelSpec, source: WeightSource) -> None:
    """Embeddings, vision tower, final norm and head, as they are."""
    path = run.root / PASSTHROUGH
    if not path.exists() and not (run.output / PASSTHROUGH).exists():
        publish_tensors(path, {name: source.get(name) for name in spec.passthrough})


def assemble(
    run: RunDir,
    spec: ModelSpec,
    source: WeightSource,
    recipe: Mapping[str, Any],
    run_info: Mapping[str, Any],
) -> None:
    """Renames the finished files into place and writes index, manifest and, last of all, config.json."""
    reports = [run.block_report(b.index) for b in spec.blocks]
    files = {run.block_name(b.index): r["sha256"] for b, r in zip(spec.blocks, reports, strict=True)}
    weight_map = dict.fromkeys(spec.passthrough, PASSTHROUGH)
    for name, report in zip(files, reports, strict=True):
        weight_map |= dict.fromkeys(report["tensors"], name)
        _move(run.root / "blocks" / name, run.output / name, files[name])
    _move(run.root / PASSTHROUGH, run.output / PASSTHROUGH, None)
    files[PASSTHROUGH] = sha256(run.output / PASSTHROUGH)
    size = sum((run.output / name).stat().st_size for name in files)
    publish_json(
        run.output / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))},
    )
    for name in COPIED:
        if (source.folder / name).exists():
            publish(run.output / name, partial(shutil.copyfile, source.folder / name))
    manifest = {
        "recipe": recipe,
        "run": run_info,
        "files": files,
        **cost_per_weight(spec, reports),
        "fallbacks": {k: v for r in reports for k, v in r["fallbacks"].items()},
        "blocks": [{k: r[k] for k in ("index", "groups")} for r in reports],
    }
    publish_json(run.output / MANIFEST, manifest)
    config = dict(source.config)
    config["quantization_config"] = quantization_config(recipe, [r["layout"] for r in reports])
    publish_json(run.output / "config.json", config)


def cost_per_weight(spec: ModelSpec, reports: list[dict[str, Any]]) -> dict[str, float]:
    """Everything stored for the quantized linears, what one token reads of it, and its multiplications, over the
    number of weights."""
    groups = [group for report in reports for group in report["groups"].values()]
    weights = sum(block.num_weights for block in spec.blocks)
    return {
        "bits_per_weight": 8 * sum(g["bytes"] for g in groups) / weights,
        "active_bits_per_weight": 8 * sum(g["active_bytes"] for g in groups) / weights,
        "macs_per_weight": sum(g["macs"] for g in groups) / weights,
    }


def quantization_config(recipe: Mapping[str, Any], layouts: list[dict[str, Any]]) -> dict[str, Any]:
    """What config.json says: equal block layouts are written once."""
    distinct: list[dict[str, Any]] = []
    of_block = []
    for one in layouts:
        if one not in distinct:
            distinct.append(one)
        of_block.append(distinct.index(one))
    return {
        "quant_method": "qe",
        "format": "pack-quantized",
        "version": 1,
        "scheme": recipe["scheme"],
        "layouts": distinct,
        "block_layouts": of_block,
    }


def report_dict(index: int, groups: Mapping[str, QuantizedGroup], spec: BlockSpec) -> dict[str, Any]:
    """A block's line in the manifest, and what only its own report has: layout and seconds, which differ every time."""
    reports = {name: group.report for name, group in groups.items()}
    return {
        "index": index,
        "groups": {n: {k: v for k, v in asdict(r).items() if k != "seconds"} for n, r in reports.items() if r},
        "fallbacks": {f"{spec.prefix}{n}": list(r.fallbacks) for n, r in reports.items() if r and r.fallbacks},
        "layout": layout(spec, groups),
        "fit_seconds": sum(r.seconds for r in reports.values() if r),
    }


def _move(old: Path, new: Path, digest: str | None) -> None:
    """Checks and renames; already renamed where an earlier assemble was interrupted."""
    found = old if old.exists() else new
    if not found.exists():
        raise CheckpointError(
            f"{old} is missing; every worker must see the same {new.parent} (a shared file system). "
            "Delete the block's report beside it to have it fitted again"
        )
    if digest is not None and sha256(found) != digest:
        found.unlink()
        old.with_suffix(".json").unlink(missing_ok=True)
        raise CheckpointError(f"{found} is not what was written; type the same command again to fit the block anew")
    if found is old:
        os.replace(old, new)


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())
