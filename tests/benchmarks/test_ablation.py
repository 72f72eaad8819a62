"""The rows of the ablation are recipes, and what they are compared with is the recipe of that name."""

from pathlib import Path

import pytest

from qe_dist.methods.recipes import load_recipe

ROWS = sorted((Path(__file__).parents[2] / "benchmarks" / "quality" / "ablation").glob("*.toml"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.stem)
def test_a_row_is_a_recipe_of_the_format_in_its_name(row: Path) -> None:
    assert str(load_recipe(str(row)).scheme).startswith(row.stem.partition("-")[0])


@pytest.mark.parametrize(("row", "name"), [("full", "qe"), ("paper", "qe-paper")])
def test_the_row_that_others_change_is_the_named_recipe(row: str, name: str) -> None:
    file = next(f for f in ROWS if f.stem == f"w4a6-{row}")
    assert load_recipe(str(file)) == load_recipe(f"{name}-w4a6")


def test_no_two_rows_are_the_same_recipe() -> None:
    recipes = [load_recipe(str(row)) for row in ROWS]
    assert all(a != b for i, a in enumerate(recipes) for b in recipes[:i])
