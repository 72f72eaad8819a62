"""Recipes by name and from a file of the user's own, and what is said when one cannot be."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qe_dist.core.errors import ConfigError
from qe_dist.core.scheme import Scheme
from qe_dist.methods.base import Budget
from qe_dist.methods.channels.lists import ChannelLists
from qe_dist.methods.compensation.none import NoCompensation
from qe_dist.methods.compensation.qera import QERA
from qe_dist.methods.compensation.quant_experts import QuantExperts
from qe_dist.methods.quantizers.gptq import GPTQ
from qe_dist.methods.quantizers.rtn import RoundToNearest
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.recipes import RECIPES, load_recipe, recipe_from
from qe_dist.methods.rotations.hadamard import Hadamard
from qe_dist.methods.transforms.none import NoTransform
from qe_dist.methods.transforms.outlier_smoothing import OutlierSmoothing
from qe_dist.methods.transforms.smoothquant import SmoothQuant


@pytest.mark.parametrize("name", RECIPES)
def test_a_named_recipe_is_plain_data_and_back(name: str) -> None:
    """Through JSON, as the manifest of a checkpoint keeps it."""
    recipe = load_recipe(name)
    assert recipe_from(json.loads(json.dumps(recipe.describe()))) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_name_says_the_bits(name: str) -> None:
    assert str(RECIPES[name].scheme).startswith(name.rsplit("-", 1)[1])


@pytest.mark.parametrize(
    ("name", "arithmetic", "rotation", "channels", "bits"),
    [
        ("qe-w4a16", "a16", None, ChannelLists(), 0.25),
        ("qe-w3a16", "a16", None, ChannelLists(), 0.25),
        ("qe-w4a4k8", "a16", None, ChannelLists(), 0.25),
        ("qe-w4a8", "int8", None, ChannelLists(), 0.25),
        ("qe-w4a6g64", "int8", Hadamard(octaves=8.0), None, 0.45),
        ("qe-w4a4", "int8", Hadamard(octaves=8.0), None, 0.45),
    ],
)
def test_ours_is_chosen_for_each_arithmetic(
    name: str, arithmetic: str, rotation: Any, channels: Any, bits: float
) -> None:
    recipe = load_recipe(name)
    assert recipe.scheme.arithmetic == arithmetic
    assert (recipe.rotation, recipe.channels) == (rotation, channels)
    assert (recipe.transform, recipe.quantizer, recipe.compensation) == (NoTransform(), GPTQ(), QERA())
    assert recipe.budget == Budget(extra_bits=bits, factor_bits=4)


def test_quant_experts_are_those_of_the_paper() -> None:
    """arXiv 2602.24059: ranks 32 + 32, 8 routed experts, k = 32."""
    recipe = RECIPES["qe-paper-w4a6"]
    assert recipe.scheme == Scheme(4, 6)
    assert recipe.transform == OutlierSmoothing(k=32)
    assert recipe.compensation == QuantExperts(k=32, num_experts=8)
    assert recipe.budget == Budget(rank=64, capped=True)
    assert RECIPES["qe-w3a16"].scheme == Scheme(3, None, 128)


def test_settings_that_are_not_the_defaults_survive() -> None:
    recipe = Recipe(
        Scheme(3, 8, 64),
        SmoothQuant(alpha=0.25),
        RoundToNearest(),
        QuantExperts(k=16, num_experts=4, router="mean_residual", refine_epochs=2),
        Budget(extra_bits=1.5, factor_bits=8),
        granularity="linear",
        rotation=Hadamard(seed=3, octaves=0.0),
    )
    assert recipe_from(json.loads(json.dumps(recipe.describe()))) == recipe


def test_what_is_left_out_is_plain_rounding() -> None:
    recipe = recipe_from({"scheme": "w4a8"})
    assert (recipe.transform, recipe.quantizer, recipe.compensation) == (
        NoTransform(),
        RoundToNearest(),
        NoCompensation(),
    )
    assert recipe.granularity == "group"
    assert recipe.rotation is None
    assert "rotation" not in recipe.describe()


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        """
        scheme = "w4a6g64"
        granularity = "linear"

        [transform]
        name = "smoothquant"
        alpha = 1

        [compensation]
        name = "quant_experts"
        num_experts = 4
        extract = true

        [rotation]
        octaves = 1

        [budget]
        extra_bits = 1
        factor_bits = 8
        """,
        encoding="utf-8",
    )
    assert load_recipe(str(path)) == Recipe(
        Scheme(4, 6, 64),
        SmoothQuant(alpha=1.0),  # a whole number will do for a fraction
        RoundToNearest(),
        QuantExperts(num_experts=4, extract=True),
        Budget(extra_bits=1.0, factor_bits=8),
        granularity="linear",
        rotation=Hadamard(octaves=1.0),
    )


QE = {"name": "quant_experts"}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "needs a scheme"),
        ({"scheme": "w4a8", "quantiser": {}}, "recipe has no 'quantiser'.*quantizer"),
        ({"scheme": "w4a8", "compensation": QE | {"expert": 4}}, "compensation has no 'expert'.*num_experts"),
        ({"scheme": "w4a8", "compensation": {"rank": 4}}, "compensation has no 'rank'"),
        ({"scheme": "w4a8", "transform": {"name": "smoothquant", "beta": 1}}, "transform has no 'beta'.*alpha"),
        ({"scheme": "w4a8", "budget": {"ranks": 4}}, "budget has no 'ranks'.*extra_bits.*rank"),
        ({"scheme": "w4a8", "compensation": {"name": "qe"}}, "no compensation 'qe'.*quant_experts"),
        ({"scheme": "w4a8", "quantizer": {"name": "magic"}}, "no quantizer 'magic'.*rtn"),
        ({"scheme": "w4a8", "rotation": {"name": "learned"}}, "no rotation 'learned'.*hadamard"),
        ({"scheme": "w4a8", "rotation": {"angle": 1}}, "rotation has no 'angle'.*seed"),
        ({"scheme": "w4a8", "rotation": {"seed": -1}}, r"rotation\.seed must lie in"),
        ({"scheme": "w4a8", "granularity": "tensor"}, "granularity.*'tensor'"),
    ],
)
def test_unknown_words_are_refused_by_name(content: Mapping[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        recipe_from(content)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"scheme": "w1a8"}, "weight bits"),
        ({"scheme": "w9a8"}, "weight bits"),
        ({"scheme": "w4a12"}, "activation bits"),
        ({"scheme": "w4a8g100"}, "group size"),
        ({"scheme": "w4a8", "budget": {"rank": 8, "factor_bits": 6}}, "budget.factor_bits"),
        ({"scheme": "w4a8", "budget": {"rank": 0}}, "budget.rank"),
        ({"scheme": "w4a8", "budget": {"extra_bits": 1.0, "capped": True}}, "budget.capped is for a rank"),
        ({"scheme": "w4a8", "compensation": QE | {"router_input": "both"}}, "router_input must be sublayer or own"),
        ({"scheme": "w4a8", "budget": {"extra_bits": -1.0}}, "budget.extra_bits"),
        ({"scheme": "w4a8", "budget": {"extra_bits": float("inf")}}, "budget.extra_bits"),
        ({"scheme": "w4a8", "budget": {"extra_bits": float("nan")}}, "budget.extra_bits"),
        ({"scheme": "w4a8", "budget": {"rank": 8, "extra_bits": 1.0}}, "budget.*exactly one"),
        ({"scheme": "w4a8", "budget": {"rank": 8, "ratio": 0.1}}, "budget.*exactly one"),
        ({"scheme": "w4a8", "budget": {"ratio": 0.0}}, "budget.ratio"),
        ({"scheme": "w4a8", "budget": {"ratio": float("nan")}}, "budget.ratio"),
        ({"scheme": "w4a8", "budget": {}}, "budget.*exactly one"),
        ({"scheme": "w4a8", "transform": {"name": "smoothquant", "alpha": 1.5}}, "transform.alpha"),
        ({"scheme": "w4a8", "transform": {"name": "smoothquant", "alpha": float("nan")}}, "transform.alpha"),
        ({"scheme": "w4a8", "transform": {"name": "outlier_smoothing", "k": 0}}, "transform.k"),
        ({"scheme": "w4a8", "compensation": QE | {"k": 0}}, "compensation.k"),
        ({"scheme": "w4a8", "compensation": {"name": "lqer", "metric": "exact"}}, "compensation.metric.*identity"),
        ({"scheme": "w4a8", "compensation": {"name": "qera", "metric": "approx"}}, "compensation.metric.*diagonal"),
        ({"scheme": "w4a8", "compensation": {"name": "aser", "k": 0}}, "compensation.k"),
        ({"scheme": "w4a8", "compensation": {"name": "salient", "share": 0}}, "compensation.share"),
        ({"scheme": "w4a8", "compensation": {"name": "salient", "share": float("nan")}}, "compensation.share"),
        ({"scheme": "w4a8", "compensation": QE | {"num_experts": 0}}, "num_experts"),
        ({"scheme": "w4a8", "compensation": QE | {"refine_epochs": -1}}, "refine_epochs"),
        ({"scheme": "w4a8", "compensation": QE | {"router": "random"}}, "compensation.router"),
        ({"scheme": "w4a8", "compensation": QE | {"extract": True, "refine_epochs": 1}}, "compensation.refine_epochs"),
    ],
)
def test_impossible_values_are_refused_by_name(content: Mapping[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        recipe_from(content)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"scheme": 4}, "scheme"),
        ({"scheme": ["w4a8"]}, "scheme"),
        ({"scheme": "w4a8", "transform": "smoothquant"}, "transform must be a table"),
        ({"scheme": "w4a8", "transform": {"name": 3}}, "no transform '3'"),
        ({"scheme": "w4a8", "transform": {"name": "smoothquant", "alpha": "0.5"}}, "transform.alpha"),
        ({"scheme": "w4a8", "transform": {"name": "smoothquant", "alpha": True}}, "transform.alpha"),
        ({"scheme": "w4a8", "compensation": QE | {"num_experts": 2.5}}, "compensation.num_experts"),
        ({"scheme": "w4a8", "compensation": QE | {"num_experts": "8"}}, "compensation.num_experts"),
        ({"scheme": "w4a8", "compensation": QE | {"k": True}}, "compensation.k"),
        ({"scheme": "w4a8", "compensation": QE | {"extract": 1}}, "compensation.extract"),
        ({"scheme": "w4a8", "compensation": QE | {"router": 3}}, "compensation.router"),
        ({"scheme": "w4a8", "budget": 64}, "budget must be a table"),
        ({"scheme": "w4a8", "budget": {"rank": "64"}}, "budget.rank"),
        ({"scheme": "w4a8", "budget": {"rank": 2.5}}, "budget.rank"),
        ({"scheme": "w4a8", "budget": {"extra_bits": "1"}}, "budget.extra_bits"),
        ({"scheme": "w4a8", "budget": {"rank": 8, "factor_bits": 8.5}}, "budget.factor_bits"),
        ({"scheme": "w4a8", "granularity": 3}, "granularity"),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(content: Mapping[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        recipe_from(content)


def test_a_word_that_is_neither_name_nor_file_is_refused_with_all_names() -> None:
    with pytest.raises(ConfigError, match=r"'qed-w4a6'.*nothing is called 'qed'.*qe-w4a6"):
        load_recipe("qed-w4a6")


@pytest.mark.parametrize(
    "content", [b'scheme = "w4a8', b"\xff\xfe", b'scheme = "w1a8"'], ids=["not TOML", "not text", "impossible"]
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        load_recipe(str(path))


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no recipe"):
        load_recipe(str(tmp_path))


def test_what_is_described_cannot_change_the_recipe() -> None:
    recipe = replace(RECIPES["qera-w4a8"], compensation=QERA())
    recipe.describe()["budget"]["rank"] = 1
    assert recipe.budget == Budget(rank=64, capped=True)


def test_a_name_is_parts_and_a_number_format_and_a_budget() -> None:
    recipe = load_recipe("smoothquant+qera-w4a6k64@0.5")
    assert str(recipe.scheme) == "w4a6k64"
    assert (recipe.transform, recipe.compensation) == (SmoothQuant(), QERA())
    assert recipe.budget == Budget(extra_bits=0.5, factor_bits=8)
    assert load_recipe("smoothquant-w4a16").scheme == Scheme(4, None, 128)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smoothquant+outlier_smoothing-w4a6", "SmoothQuant and outlier_smoothing are both a transform"),
        ("rtn+lqer+aser-w4a6", "lqer and aser are both a compensation"),
        ("qe-w4a6x", "not of the form"),
        ("qe-w4a6@much", "could not convert"),
        ("qe-w4a6@-1", "extra_bits must be positive"),
        ("qe", "not of the form"),
        ("missing.toml", "does not exist"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_the_reason(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_recipe(name)


def test_a_rank_that_a_user_asks_for_is_taken_as_it_is_and_that_of_a_name_shrinks_on_narrow_layers() -> None:
    """576 is the width of SmolLM2-135M; 1536 that of the narrowest model of the Quant Experts paper."""
    asked, named = recipe_from({"scheme": "w4a8", "budget": {"rank": 64}}).budget, load_recipe("qera-w4a8").budget
    assert [asked.rank_for(4096, width) for width in (32, 576, 1536, 8192)] == [32, 64, 64, 64]
    assert [named.rank_for(4096, width) for width in (32, 576, 1536, 8192)] == [1, 24, 64, 64]
