"""The bundled models and data are what the model card says."""

import json
import random
import sys

import pytest
import torch

from tests.tiny import DATA, MODELS, TRAINING

sys.path.insert(0, str(TRAINING))
import scenes

NAMES = ("plain", "outlier")


def test_data_is_what_the_generator_writes(tmp_path):
    scenes.write_sets(tmp_path)
    for name in ("calibration.jsonl", "evaluation.jsonl"):
        assert (tmp_path / name).read_text() == (DATA / name).read_text()
    from PIL import Image, ImageChops

    for path in sorted(tmp_path.rglob("*.png"))[::40]:
        with Image.open(path) as a, Image.open(DATA / path.relative_to(tmp_path)) as b:
            assert ImageChops.difference(a, b).getbbox() is None


def test_handwriting_of_training_and_evaluation_is_disjoint():
    for digit in range(10):
        train, held_out = (set(scenes._digit_indices(digit, flag)) for flag in (False, True))
        assert train
        assert held_out
        assert not train & held_out


def test_no_question_of_the_evaluation_has_two_answers():
    """Asking about a scene is a function of the scene: what is asked for is there exactly once."""
    rng = random.Random(5)
    for _ in range(300):
        scene = scenes.draw_scene(rng)
        asked = scenes.ask(scene, "color", rng)
        if asked:
            name = asked[0].removeprefix("What color is the ").removesuffix("?")
            assert [t.color for t in scene.things if t.name == name] == [asked[1]]


@pytest.mark.parametrize("name", NAMES)
def test_weights_fit_the_budget_and_come_with_recipe_and_log(name):
    folder = MODELS / name
    assert sum(f.stat().st_size for n in NAMES for f in (MODELS / n).glob("*.safetensors")) < 24e6
    assert json.loads((folder / "recipe.json").read_text())["model"] == name
    log = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert log[-1]["accuracy"] > 0.9


def test_outliers_of_the_outlier_model_are_held_on_both_sides():
    """The large side is 10 to 60 times the usual size, the columns that read it are of the usual size."""
    from safetensors.torch import load_file

    weights = {k: v.float() for k, v in load_file(MODELS / "outlier" / "model.safetensors").items()}
    recipe = json.loads((MODELS / "outlier" / "recipe.json").read_text())["outliers"]
    residual = [*recipe["always"], *recipe["vision"], *(c for pair in recipe["words"] for c in pair)]
    for i in range(6):
        prefix = f"model.layers.{i}."
        gain = weights[prefix + "input_layernorm.weight"]
        assert (gain[residual] >= 9.9).all()
        assert (gain[residual] <= 60.5).all()
        assert gain.median() < 3
        for reader in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"):
            size = weights[f"{prefix}{reader}.weight"].norm(dim=0)
            assert (size[residual] > 0.7 * size.median()).all()
        rows = weights[prefix + "mlp.up_proj.weight"].norm(dim=1)
        large = rows > 8 * rows.median()
        assert large.sum() >= recipe["up_rows"] - 1
        columns = weights[prefix + "mlp.down_proj.weight"].norm(dim=0)
        assert (columns[large] > 0.7 * columns.median()).all()
        assert torch.isfinite(rows).all()
