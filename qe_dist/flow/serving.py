"""Whether what a run makes can be served over the tensor-parallel ranks that it is asked for."""

from collections.abc import Mapping
from typing import Any

from qe_dist import archs
from qe_dist.core.errors import ConfigError
from qe_dist.core.spec import ModelSpec
from qe_dist.flow.config import RunConfig
from qe_dist.methods.base import RoutesTokens
from qe_dist.numerics.serving import BY_MODALITY, cut_problems, routed_problems, together_problems, vision_problems


def check_serving(model: ModelSpec, run: RunConfig, config: Mapping[str, Any]) -> None:
    """ConfigError where what a run makes could not be served over the ranks that it is asked for.

    model, config: as padded for the run. A single rank is what every model has.
    """
    size, recipe = run.tensor_parallel_size, run.recipe
    if size == 1:
        return
    arch = archs.get(model.arch)
    problems = [*vision_problems(arch.vision_heads(config), size)]
    if recipe.by_modality:
        problems.append(f"the recipe {BY_MODALITY}")
    groups = [(view, group) for view in map(recipe.view, model.kinds) for group in view.groups]
    for view, group in groups:
        problems += together_problems(group.name, [x.name for x in group.linears], arch.groups(config))
        if isinstance(recipe.compensation, RoutesTokens):
            problems += routed_problems(group.name, view.group(group.router_input).linears, size)
        problems += cut_problems(group.name, group.linears, recipe.scheme, size, mixed=1)  # blocks are made to fit
    if problems:
        raise ConfigError(
            f"at --tensor-parallel-size {size} {run.output} could not be served: {problems[0]}. Choose another size, "
            "or another recipe"
        )
