"""Over how many tensor-parallel ranks a checkpoint can be served: by names and numbers, without a weight in memory."""

from collections.abc import Collection, Mapping
from typing import Any

from qe_dist import archs
from qe_dist.core.errors import ConfigError
from qe_dist.core.layout import GroupLayout, Layout
from qe_dist.core.spec import InputGroup, LinearSpec
from qe_dist.numerics.serving import BY_MODALITY, cut_problems, routed_problems, together_problems, vision_problems

SIZES = (1, 2, 4, 8)
"""Tensor-parallel sizes that are asked about where nobody names any."""


def serving_problems(config: Mapping[str, Any], size: int) -> tuple[str, ...]:
    """Why a checkpoint cannot be served by vLLM over `size` tensor-parallel ranks, a line each; empty where it can.

    config: the checkpoint's `config.json`. ConfigError where it is not one of ours, or the size below 1.
    """
    if size < 1:
        raise ConfigError(f"the tensor-parallel size must be at least 1, found {size}")
    layout = Layout.from_json(config.get("quantization_config"))
    arch = archs.for_checkpoint(config)
    of_model = arch.groups(config)
    problems = [*vision_problems(arch.vision_heads(config), size)]
    for block in layout.distinct:
        for name, group in block.groups.items():
            problems += together_problems(name, group.linears, of_model)
            problems += [f"{name}: {BY_MODALITY}"] if group.by_modality else []
            if group.routed:
                problems += routed_problems(name, layout_linears(block.groups[group.router_input], of_model), size)
            linears = layout_linears(group, of_model)
            problems += cut_problems(name, linears, group.scheme, size, group.rotated_block)
    return tuple(dict.fromkeys(problems))


def served_sizes(config: Mapping[str, Any]) -> str:
    """Says which of SIZES can be served, and why not the others, the first reason of each."""
    why = {size: serving_problems(config, size) for size in SIZES}
    served = ", ".join(str(size) for size in SIZES if not why[size])
    others = "".join(f"; {size} is not: {why[size][0]}" for size in SIZES if why[size])
    return f"tensor-parallel sizes that can be served: {served or 'none'}{others}"


def layout_linears(group: GroupLayout, of_model: Collection[InputGroup]) -> tuple[LinearSpec, ...]:
    """The linears of a group in `config.json`, as the model has them."""
    known = {x.name: x for one in of_model for x in one.linears}
    if unknown := [name for name in group.linears if name not in known]:
        raise ConfigError(f"config.json quantizes {unknown[0]}, which its model does not have")
    return tuple(known[name] for name in group.linears)
