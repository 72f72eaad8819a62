"""Over how many tensor-parallel ranks a checkpoint can be served: by names and numbers, without a weight in memory.

The rules of the quantized groups are `numerics/sharding.py`, which the engines follow, too; those of attention heads
are vLLM's: query heads are dealt out whole, and a key-value head may be on several ranks.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qe_dist import archs
from qe_dist.core.errors import ConfigError
from qe_dist.core.quantized import rotated_block
from qe_dist.core.scheme import Scheme
from qe_dist.core.spec import InputGroup, LinearSpec, ModelSpec
from qe_dist.flow.config import RunConfig
from qe_dist.methods.base import RoutesTokens
from qe_dist.numerics.sharding import why_not

SIZES = (1, 2, 4, 8)
"""That are asked about where nobody names any."""
BY_MODALITY = "treats text and image tokens differently, which vLLM does not know; serve with transformers"


def serving_problems(config: Mapping[str, Any], size: int) -> tuple[str, ...]:
    """Why a checkpoint cannot be served by vLLM over `size` tensor-parallel ranks, a line each; empty where it can.

    config: the checkpoint's `config.json`. ConfigError where it is not one of ours, or the size below 1.
    """
    if size < 1:
        raise ConfigError(f"the tensor-parallel size must be at least 1, found {size}")
    if config.get("quantization_config", {}).get("quant_method") != "qe":
        raise ConfigError("config.json has no quantization_config of qe_dist; give a finished checkpoint")
    arch = archs.for_checkpoint(config)
    of_model = arch.groups(config)
    problems = [*_vision(arch.vision_heads(config), size)]
    for layout in config["quantization_config"]["layouts"]:
        for name, group in layout.items():
            problems += _together(name, group["linears"], of_model)
            problems += _by_modality(name, group["input"])
            if "router" in group["input"]:
                problems += _routed(name, layout_linears(layout[group["router_input"]], of_model), size)
            linears, mixed = layout_linears(group, of_model), rotated_block(group["input"])
            problems += _cut(name, linears, Scheme.parse(group["scheme"]), size, mixed)
    return tuple(dict.fromkeys(problems))


def served_sizes(config: Mapping[str, Any]) -> str:
    """Of SIZES, in words; and why not the others, the first reason of each."""
    why = {size: serving_problems(config, size) for size in SIZES}
    served = ", ".join(str(size) for size in SIZES if not why[size])
    others = "".join(f"; {size} is not: {why[size][0]}" for size in SIZES if why[size])
    return f"tensor-parallel sizes that can be served: {served or 'none'}{others}"


def check_serving(model: ModelSpec, run: RunConfig, config: Mapping[str, Any]) -> None:
    """ConfigError where what a run makes could not be served over the ranks that it is asked for.

    model, config: as padded for the run. A single rank is what every model has.
    """
    size, recipe = run.tensor_parallel_size, run.recipe
    if size == 1:
        return
    arch = archs.get(model.arch)
    problems = [*_vision(arch.vision_heads(config), size)]
    if recipe.by_modality:
        problems.append(f"the recipe {BY_MODALITY}")
    view = recipe.view(model.blocks[0])
    for group in view.groups:
        problems += _together(group.name, [x.name for x in group.linears], arch.groups(config))
        if isinstance(recipe.compensation, RoutesTokens):
            problems += _routed(group.name, view.group(group.router_input).linears, size)
        problems += _cut(group.name, group.linears, recipe.scheme, size, mixed=1)  # blocks are made to fit
    if problems:
        raise ConfigError(
            f"at --tensor-parallel-size {size} {run.output} could not be served: {problems[0]}. Choose another size, "
            "or another recipe"
        )


def layout_linears(group: Mapping[str, Any], of_model: Collection[InputGroup]) -> tuple[LinearSpec, ...]:
    """The linears of a group in `config.json`, as the model has them."""
    known = {x.name: x for one in of_model for x in one.linears}
    if unknown := [name for name in group["linears"] if name not in known]:
        raise ConfigError(f"config.json quantizes {unknown[0]}, which its model does not have")
    return tuple(known[name] for name in group["linears"])


def parts_of(linear: LinearSpec, size: int) -> int:
    """How many different parts of a linear `size` ranks hold: fewer than ranks where they share key-value heads."""
    return size if linear.heads is None else min(size, linear.heads)


def _vision(heads: int, size: int) -> Iterator[str]:
    if heads % size:
        yield f"the {heads} heads of the vision tower do not divide over {size} ranks"


def _together(name: str, linears: Collection[str], of_model: Collection[InputGroup]) -> Iterator[str]:
    if {*linears} not in [{x.name for x in group.linears} for group in of_model]:
        yield f"{name}: fitted by itself, but vLLM computes the linears of one input at once; fit them as a group"


def _by_modality(name: str, inputs: Mapping[str, Any]) -> Iterator[str]:
    """As `GroupInput.by_modality`, by shapes."""
    own_scales = inputs.get("input_scale", ("", 1))[1] > 1
    if own_scales or ("router" not in inputs and {"lr_expert_a", "lr_expert_channels"} & inputs.keys()):
        yield f"{name}: {BY_MODALITY}"


def _routed(name: str, read: tuple[LinearSpec, ...], size: int) -> Iterator[str]:
    """read: linears of the group whose input the router reads."""
    if size > 1 and read[0].split == "row":
        yield f"{name}: its router reads the input of {read[0].name}, of which a rank has only a part"


def _cut(name: str, linears: tuple[LinearSpec, ...], scheme: Scheme, size: int, mixed: int) -> Iterator[str]:
    most = max(x.heads or 0 for x in linears)
    for x in linears:
        if x.heads and x.heads % size and (x.heads == most or size % x.heads):
            yield f"{name}: the {x.heads} heads of {x.name} do not divide over {size} ranks"
            return
    outputs = {x.name: x.out_features for x in linears if x.heads is None}  # whole heads are whole outputs
    if why := why_not(scheme, outputs, linears[0].in_features, linears[0].split, size, mixed):
        yield f"{name}: {why}"
