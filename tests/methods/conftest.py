"""Input groups of known structure: channels that are loud for every token, others only together and for some."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qe_dist.core.batch import IMAGE, TEXT
from qe_dist.core.spec import InputGroup, LinearSpec
from qe_dist.methods.base import GroupProblem
from qe_dist.methods.recipe import Recipe
from qe_dist.numerics.stats import GroupStats


@dataclass(frozen=True)
class Planted:
    x: Tensor
    always: Tensor
    """Channels that are loud for every token."""
    own: Tensor
    """Channels that are loud for the tokens of one kind. [kinds, channels]"""
    kind: Tensor
    """Of each token."""


@pytest.fixture(scope="session")
def planted() -> Callable[..., Planted]:
    """planted(tokens, width): the loud channels of a token are up to 30 times the others."""

    def draw(tokens: int, width: int, *, always: int = 2, kinds: int = 4, each: int = 4) -> Planted:
        random = torch.Generator().manual_seed(tokens + width)
        order = torch.randperm(width, generator=random)
        kind = torch.randint(kinds, (tokens,), generator=random)
        own = order[always : always + kinds * each].view(kinds, each)
        x = torch.randn(tokens, width, generator=random)
        loud = torch.where(torch.rand(tokens, each, generator=random) < 0.7, 15.0, 1.0)
        x.scatter_(1, own[kind], x.gather(1, own[kind]) * loud)
        x[:, order[:always]] *= 30.0
        return Planted(x, order[:always], own, kind)

    return draw


@pytest.fixture(scope="session")
def problem_for(normal: Callable[..., Tensor]) -> Callable[..., GroupProblem]:
    """problem_for(recipe, x): a group of two linears that reads these tokens; every second token is of an image.

    The router reads the same tensor, or `router_x` of another group. Statistics are gathered in `batches` parts,
    in one pass, or in one pass each and merged.
    """

    def build(
        recipe: Recipe, x: Tensor, *, router_x: Tensor | None = None, batches: int = 1, merged: bool = False
    ) -> GroupProblem:
        width = x.shape[1]
        sizes = {"gate": 48, "up": 32}
        weights = {n: normal(i, size, width) / width**0.5 for i, (n, size) in enumerate(sizes.items())}
        specs = tuple(LinearSpec(n, width, size, False, "column") for n, size in sizes.items())
        group = InputGroup("gate_up", specs, router_input="gate_up" if router_x is None else "other")
        router_x = x if router_x is None else router_x

        def empty() -> GroupStats:
            return GroupStats.empty(weights, router_x.shape[1], recipe.needs(), sample_size=1024)

        def parts() -> Iterator[GroupStats]:
            whole = empty()
            for rows in torch.arange(len(x)).chunk(batches):
                stats = empty() if merged else whole
                modality = torch.where(rows % 2 == 0, TEXT, IMAGE).to(torch.int8)
                stats.update(x[rows], router_x[rows], modality, rows)  # the sample keeps the order of x
                yield stats

        stats, *others = list(parts())
        for other in others if merged else ():
            stats = stats.merge(other)
        return GroupProblem(group, weights, stats, recipe.scheme, seed=5)

    return build
