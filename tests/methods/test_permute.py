"""A permuted block is the same function, to the order of summation, whatever was fitted."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from qe_dist.core.errors import ConfigError
from qe_dist.core.quantized import QuantizedGroup, input_tensors, repair_tensors
from qe_dist.core.spec import BlockSpec, InputGroup, LinearSpec, per_linear
from qe_dist.methods.base import GroupProblem
from qe_dist.methods.permute import permuted, salient_first
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.recipes import recipe_from
from qe_dist.numerics.reference import linear_forward, prepare, route
from qe_dist.numerics.stats import GroupStats

WIDTH, WIDE, TOKENS = 48, 192, 200
GATE_UP = ("gate", "up")
GROUPS = (
    InputGroup("gate_up", tuple(LinearSpec(n, WIDTH, WIDE, False, "column") for n in GATE_UP), "gate_up"),
    InputGroup("down", (LinearSpec("down", WIDE, WIDTH, False, "row"),), "gate_up", producers=GATE_UP),
)
BLOCK = BlockSpec(0, "", GROUPS, ())

RECIPES = {
    "serq": {"transform": {"name": "smoothquant", "alpha": 1.0}, "compensation": {"name": "salient"}},
    "serq and an adapter": {"transform": {"name": "smoothquant"}, "compensation": {"name": "salient", "share": 0.5}},
    "extraction": {"compensation": {"name": "quant_experts", "extract": True, "num_experts": 3}},
    "experts": {"compensation": {"name": "quant_experts", "num_experts": 3}},
}

Groups = Mapping[str, QuantizedGroup]


@pytest.fixture(scope="module")
def x(planted: Callable[..., Any]) -> Tensor:
    return planted(TOKENS, WIDTH).x


def output(groups: Groups, block: BlockSpec, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)), each linear as it was quantized."""

    def run(group: InputGroup, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fitted = groups[group.name]
        own = inputs[group.name]
        ready = prepare(fitted.input, own, route(fitted.input, inputs[group.router_input]), fitted.scheme, None)
        return {name: linear_forward(linear, ready) for name, linear in fitted.linears.items()}

    *first, last = block.groups
    inputs = {group.name: x for group in first}
    y = {name: out for group in first for name, out in run(group, inputs).items()}
    return run(last, {**inputs, last.name: silu(y["gate"]) * y["up"]})["down"]


def fit(recipe: Recipe, block: BlockSpec, x: Tensor, normal: Callable[..., Tensor]) -> Groups:
    weights = {n: normal(i, WIDE, WIDTH) / WIDTH**0.5 for i, n in enumerate(GATE_UP)}
    weights["down"] = normal(2, WIDTH, WIDE) / WIDE**0.5
    h = silu(x @ weights["gate"].T) * (x @ weights["up"].T)
    done = {}
    for group in block.groups:
        own = {linear.name: weights[linear.name] for linear in group.linears}
        inputs = h if "down" in own else x
        router_x = inputs if group.router_input == group.name else x
        stats = GroupStats.empty(own, router_x.shape[1], recipe.needs(), sample_size=TOKENS)
        stats.update(inputs, router_x, torch.zeros(TOKENS, dtype=torch.int8), torch.arange(TOKENS))
        done[group.name] = recipe.fit(GroupProblem(group, own, stats, recipe.scheme))
    return done


@pytest.fixture(params=["group", "linear"])
def block(request: pytest.FixtureRequest) -> BlockSpec:
    """Per linear, each routes on its own input, so that the router of down moves as well."""
    return BLOCK if request.param == "group" else per_linear(BLOCK)


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
@pytest.mark.parametrize("name", RECIPES)
def test_a_permuted_block_is_the_same_function(
    block: BlockSpec, x: Tensor, normal: Callable[..., Tensor], name: str, factor_bits: int
) -> None:
    recipe = recipe_from({"scheme": "w4a16", **RECIPES[name], "budget": {"rank": 96, "factor_bits": factor_bits}})
    groups = fit(recipe, block, x, normal)
    order = torch.randperm(WIDE, generator=torch.Generator().manual_seed(1))
    changed = permuted(groups, block, block.group("down"), order)
    for rounded in (None, 4):  # activations
        before, after = (
            output({n: replace(g, scheme=replace(g.scheme, act_bits=rounded)) for n, g in part.items()}, block, x)
            for part in (groups, changed)
        )
        assert (after - before).norm() < (1e-6 if rounded is None else 1e-3) * before.norm()  # a tie may fall otherwise


def test_the_numbers_are_the_same_ones_in_another_order(x: Tensor, normal: Callable[..., Tensor]) -> None:
    recipe = recipe_from({"scheme": "w4a4", **RECIPES["serq and an adapter"], "budget": {"rank": 96, "factor_bits": 4}})
    groups = fit(recipe, BLOCK, x, normal)
    changed = permuted(groups, BLOCK, BLOCK.group("down"), torch.arange(WIDE).flip(0))
    before, after = groups["down"], changed["down"]
    assert torch.equal(after.linears["down"].codes, before.linears["down"].codes.flip(1))
    assert torch.equal(after.input.shared_down.dense, before.input.shared_down.dense.flip(1))
    assert after.input.salient_channels.tolist() == [WIDE - 1 - c for c in before.input.salient_channels.tolist()]
    for name in GATE_UP:
        before, after = (part["gate_up"].linears[name] for part in (groups, changed))
        assert torch.equal(after.codes, before.codes.flip(0))
        assert torch.equal(after.salient_columns.dense, before.salient_columns.dense.flip(0))
    for before, after in zip(groups.values(), changed.values(), strict=True):
        pairs = [(input_tensors(before.input), input_tensors(after.input))]
        pairs += [(repair_tensors(before.linears[n]), repair_tensors(after.linears[n])) for n in before.linears]
        for old, new in pairs:
            assert {n: (t.dtype, t.shape) for n, t in new.items()} == {n: (t.dtype, t.shape) for n, t in old.items()}


def test_a_permutation_and_its_inverse_change_nothing(
    x: Tensor, normal: Callable[..., Tensor], same: Callable[[Any, Any], bool]
) -> None:
    recipe = recipe_from({"scheme": "w4a4", **RECIPES["extraction"], "budget": {"rank": 96, "factor_bits": 8}})
    groups = fit(recipe, BLOCK, x, normal)
    order = torch.randperm(WIDE, generator=torch.Generator().manual_seed(2))
    there = permuted(groups, BLOCK, BLOCK.group("down"), order)
    assert same(permuted(there, BLOCK, BLOCK.group("down"), order.argsort()), groups)


def test_salient_channels_come_first_where_producers_absorb_the_order(
    x: Tensor, normal: Callable[..., Tensor], same: Callable[[Any, Any], bool]
) -> None:
    groups = fit(recipe_from({"scheme": "w4a16", **RECIPES["serq"], "budget": {"rank": 96}}), BLOCK, x, normal)
    first = salient_first(groups, BLOCK)
    count = len(groups["down"].input.salient_channels)
    assert first["down"].input.salient_channels.tolist() == list(range(count))
    assert first["down"].input.salient_channels.dtype == torch.int32
    assert same(first["gate_up"].input, groups["gate_up"].input)  # what comes out of a norm stays
    before, after = (output(part, BLOCK, x) for part in (groups, first))
    assert (after - before).norm() < 1e-6 * before.norm()


def test_without_salient_channels_nothing_moves(x: Tensor, normal: Callable[..., Tensor]) -> None:
    groups = fit(recipe_from({"scheme": "w4a4"}), BLOCK, x, normal)
    assert salient_first(groups, BLOCK) is groups


def test_scales_of_channel_groups_are_not_mixed(x: Tensor, normal: Callable[..., Tensor]) -> None:
    groups = fit(recipe_from({"scheme": "w4a4g16", **RECIPES["serq"], "budget": {"rank": 96}}), BLOCK, x, normal)
    with pytest.raises(ConfigError, match=r"down: scheme w4a4g16 .* would mix; use one scale per output"):
        salient_first(groups, BLOCK)


def test_an_order_that_nobody_absorbs_is_refused(x: Tensor, normal: Callable[..., Tensor]) -> None:
    """A bias is copied from the source model, in the order that it has there."""
    groups = fit(recipe_from({"scheme": "w4a4"}), BLOCK, x, normal)
    with pytest.raises(ConfigError, match=r"gate_up.*no linear produces"):
        permuted(groups, BLOCK, BLOCK.group("gate_up"), torch.arange(WIDTH))
    biased = tuple(replace(linear, bias=True) for linear in GROUPS[0].linears)
    block = replace(BLOCK, groups=(replace(GROUPS[0], linears=biased), GROUPS[1]))
    with pytest.raises(ConfigError, match=r"down.*gate has a bias"):
        permuted(groups, block, block.group("down"), torch.arange(WIDE))
