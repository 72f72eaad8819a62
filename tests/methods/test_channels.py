"""Lists of channels that leave the activation grid: what is stored, what it costs, and what it goes with."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qe_dist import methods
from qe_dist.core.errors import ConfigError
from qe_dist.core.quantized import QuantizedGroup, input_tensors, num_bytes, repair_tensors
from qe_dist.methods.base import ChoosesChannels, GroupProblem
from qe_dist.methods.channels.lists import ChannelLists
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.recipes import load_recipe, recipe_from
from qe_dist.numerics.gptq import gptq
from qe_dist.numerics.reference import linear_forward, prepare, route

WIDTH, TOKENS = 192, 400
LISTS = ChannelLists(share=0.02)
"""3 of 192 channels."""

Problem = Callable[..., GroupProblem]


@pytest.fixture(scope="module")
def tokens(planted: Callable[..., Any]) -> Any:
    return planted(TOKENS, WIDTH, always=3)


def with_lists(name: str) -> Recipe:
    return replace(load_recipe(name), channels=LISTS)


def spare_bits(group: QuantizedGroup) -> int:
    """Stored beside codes and scales."""
    parts = [input_tensors(group.input), *map(repair_tensors, group.linears.values())]
    return 8 * sum(map(num_bytes, parts))


def error_of(group: QuantizedGroup, problem: GroupProblem, x: Tensor) -> float:
    """Of the whole group's output, relative, in float64."""
    modality = problem.stats.sample.modality
    ready = prepare(group.input, x, route(group.input, x, modality), group.scheme, modality)
    found = torch.cat([linear_forward(linear, ready) for linear in group.linears.values()], dim=1).double()
    wanted = x.double() @ torch.cat(list(problem.weights.values())).double().T
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", methods.names("channels"))
def test_a_member_is_a_frozen_dataclass_that_travels(name: str) -> None:
    kind = methods.get("channels", name)
    member = kind()  # every setting has a default
    assert isinstance(member, ChoosesChannels)
    assert kind.__dataclass_params__.frozen
    assert pickle.loads(pickle.dumps(member)) == member


def test_a_list_is_stored_once_and_leaves_the_codes(tokens: Any, problem_for: Problem) -> None:
    recipe = with_lists("gptq-w4a6")
    problem = problem_for(recipe, tokens.x)
    group = recipe.fit(problem)
    channels = group.input.shared_channels.long()
    assert sorted(channels.tolist()) == sorted(tokens.always.tolist())
    for name, linear in group.linears.items():
        assert not linear.codes[:, channels].any()
        assert torch.equal(linear.shared_columns, problem.weights[name][:, channels].bfloat16())
        alone = problem.weights[name].index_fill(1, channels, 0.0)
        codes, scale = gptq(alone, problem.stats.total_gram, 4, None)
        assert torch.equal(linear.codes, codes)  # as if the channels were not there
        assert torch.equal(linear.scale, scale)


def test_the_grid_of_a_token_reaches_what_is_left(tokens: Any, problem_for: Problem) -> None:
    """Loud for every token: a list holds them. The error is then that of the other channels alone."""
    recipe = with_lists("rtn-w4a6")
    problem = problem_for(recipe, tokens.x)
    group = recipe.fit(problem)
    without = replace(recipe, channels=None).fit(problem)
    assert group.report.error < 0.5 * without.report.error
    x = tokens.x.double().index_fill(1, tokens.always, 0.0)
    step = x.abs().amax(dim=1, keepdim=True) / 31
    rounded = torch.round(x / step) * step
    wrong = torch.cat(
        [x @ w.double().T - rounded @ (linear.codes.double() * linear.scale.double()).T
         for w, linear in zip(problem.weights.values(), group.linears.values(), strict=True)], dim=1
    )  # fmt: skip
    exact = tokens.x.double() @ torch.cat(list(problem.weights.values())).double().T
    assert group.report.error == pytest.approx(float(wrong.norm() / exact.norm()), rel=0.05)  # columns are bf16


@pytest.mark.parametrize("transform", ["none", "smoothquant", "awq", "outlier_smoothing"])
@pytest.mark.parametrize("compensation", methods.names("compensation"))
def test_a_listed_channel_is_exact_whatever_repairs_the_others(
    tokens: Any, problem_for: Problem, transform: str, compensation: str
) -> None:
    content = {"scheme": "w4a6", "transform": {"name": transform}, "compensation": {"name": compensation}}
    recipe = recipe_from(content | {"channels": {"name": "lists", "share": 0.02}})
    problem = problem_for(recipe, tokens.x)
    group = recipe.fit(problem)
    channels = group.input.shared_channels.long()
    assert len(channels) == 3
    alone = torch.zeros(WIDTH).index_fill(0, channels, 1.0) * tokens.x
    assert error_of(group, problem, alone) < 2**-7


def test_the_list_is_chosen_after_the_transform(tokens: Any, problem_for: Problem) -> None:
    """What smoothing made quiet needs no list."""
    recipe = with_lists("smoothquant+gptq-w4a6")
    problem = problem_for(recipe, tokens.x)
    moved = recipe.transform.fit(problem)
    assert torch.equal(recipe.fit(problem).input.shared_channels.long(), LISTS.choose(moved))


def test_every_token_counts_alike(tokens: Any, problem_for: Problem) -> None:
    """A token that is a thousand times the others has no more to say."""
    recipe = with_lists("gptq-w4a6")
    loud = tokens.x.clone()
    loud[3] *= 1000
    chosen = [LISTS.choose(problem_for(recipe, x)) for x in (tokens.x, loud)]
    assert torch.equal(*chosen)


@pytest.mark.parametrize("compensation", ["qera", "aser", "lqer", "salient"])
@pytest.mark.parametrize(("extra_bits", "factor_bits"), [(1.5, 16), (0.9, 4)])
def test_lists_and_factors_share_the_byte_budget(
    tokens: Any, problem_for: Problem, compensation: str, extra_bits: float, factor_bits: int
) -> None:
    content = {"scheme": "w4a6", "compensation": {"name": compensation}}
    content["budget"] = {"extra_bits": extra_bits, "factor_bits": factor_bits}
    plain = recipe_from(content)
    recipe = replace(plain, channels=LISTS)
    problem = problem_for(recipe, tokens.x)
    budget = extra_bits * problem.num_weights
    with_list, without = recipe.fit(problem), plain.fit(problem)
    assert with_list.report.fallbacks == ()
    assert 0.8 * budget < spare_bits(without) <= budget
    assert 0.8 * budget < spare_bits(with_list) <= budget
    assert with_list.input.shared_channels.numel() == 3


def test_a_rank_is_a_rank(tokens: Any, problem_for: Problem) -> None:
    recipe = with_lists("qera-w4a6")
    problem = problem_for(recipe, tokens.x)
    ranks = [r.fit(problem).input.shared_down.shape[0] for r in (recipe, replace(recipe, channels=None))]
    assert ranks[0] == ranks[1]


def test_a_part_of_a_name_and_a_table_of_a_file() -> None:
    recipe = load_recipe("lists+gptq+qera-w4a6@0.25")
    assert recipe.channels == ChannelLists(share=0.01)
    table = {"name": "gptq"}, {"name": "qera"}, {"name": "lists", "share": 0.01}
    content = dict(zip(("quantizer", "compensation", "channels"), table, strict=True))
    budget = {"extra_bits": 0.25, "factor_bits": 8}
    assert recipe_from({"scheme": "w4a6", "budget": budget} | content) == recipe
    assert recipe_from(recipe.describe()) == recipe
    assert load_recipe("gptq-w4a6").channels is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"channels": {"name": "lists", "share": 0.021}}, r"channels.share must be .* at most 0.02, found 0.021"),
        ({"channels": {"name": "lists", "share": 0}}, r"channels.share must be more than 0"),
        ({"channels": {"name": "lists", "k": 3}}, r"channels has no 'k'; known are: share"),
        ({"channels": {"name": "list"}}, r"no channels 'list', did you mean 'lists'\? there are: lists"),
        ({"channels": {"name": "lists"}, "budget": {"extra_bits": 0.1}}, r"channels take 0.16 bits .* than the 0.1"),
        (
            {"transform": {"name": "masquant"}, "compensation": {"name": "cross_modal"}, "channels": {}},
            "channels lists and transform masquant clash",
        ),
        (
            {"channels": {"name": "lists"}, "compensation": {"name": "quant_experts", "extract": True}},
            "channels lists and compensation quant_experts with extract = true",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(content: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe_from({"scheme": "w4a6"} | content)
