"""Pictures of the real model: a function of the seed, unseen ones apart, every answer unique and readable."""

import json
import sys

import numpy as np
import pytest
import torch

from qe_dist.data.samples import load_images, read_samples
from tests.tiny import MODELS, TRAINING

sys.path.insert(0, str(TRAINING / "real"))
import pictures
import train_vision


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_a_picture_is_a_function_of_kind_seed_and_split(kind):
    first, again = (pictures.draw(kind, 7, "train") for _ in range(2))
    assert np.array_equal(first.pixels, again.pixels)
    assert first.asks == again.asks
    for seed, split in ((8, "train"), (7, "unseen")):
        assert not np.array_equal(first.pixels, pictures.draw(kind, seed, split).pixels)


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_no_question_has_two_answers(kind):
    for seed in range(300):
        asks = set(pictures.draw(kind, seed, "train").asks)
        assert len({question for question, _ in asks}) == len(asks)


def test_unseen_codes_numbers_and_handwriting_never_occur_in_training():
    shown = {}
    for split in pictures.SPLITS:
        drawn = [pictures.draw(kind, seed, split) for kind in ("text", "digits") for seed in range(400)]
        asks = [ask for picture in drawn for ask in picture.asks]
        shown[split] = {a for q, a in asks if q in ("What is the code?", "Which number is shown?")}
        assert len(shown[split]) > 50
    assert not shown["train"] & shown["unseen"]
    for digit in range(10):
        assert not set(pictures.handwritten(digit, False)) & set(pictures.handwritten(digit, True))


def test_written_samples_are_read_as_they_were_drawn(tmp_path):
    counts = {"text": 2, "charts": 1}
    samples = read_samples(pictures.write_samples(tmp_path, "unseen", counts, 3, "unseen"))
    drawn = list(pictures.samples(counts, 3, "unseen"))
    assert [s.kind for s in samples] == [kind for _, kind, _, _ in drawn] == ["text", "charts", "text"]
    for sample, (image, _, question, answer) in zip(samples, drawn, strict=True):
        assert np.array_equal(np.asarray(load_images(sample)[0]), np.asarray(image))
        asked, said = sample.messages
        assert asked["content"][-1]["text"] == question
        assert said["content"][0]["text"] == answer


def test_samples_name_a_wrong_split():
    with pytest.raises(ValueError, match="'unseen'"):
        next(pictures.samples(1, 0, "test"))


def test_the_trained_tower_is_that_of_transformers():
    """What training computes for a picture is what the published tower and image processor compute."""
    from safetensors.torch import load_file
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tower = train_vision.build_tower()
    tower.load_state_dict(load_file(MODELS / "real/vision.safetensors"))
    drawn = [pictures.draw(kind, 0, "unseen").pixels for kind in ("text", "charts")]
    batch = Qwen2VLImageProcessorPil(**train_vision.FACTS["image_processor"])(drawn, return_tensors="pt")
    with torch.no_grad():
        want = tower(batch["pixel_values"], batch["image_grid_thw"]).pooler_output.view(2, 64, -1)
        found = train_vision.FastTower(tower)(torch.stack([torch.from_numpy(pixels) for pixels in drawn]))[0]
    assert torch.allclose(found, want, atol=1e-3 * want.abs().max().item())


def test_the_tower_fits_the_budget_and_says_how_it_was_trained():
    folder = MODELS / "real"
    assert (folder / "vision.safetensors").stat().st_size < 24e6
    training = json.loads((folder / "vision.json").read_text())["training"]
    assert set(training["kinds"]) == set(pictures.KINDS)
    assert training["steps"] > 0
    assert training["seconds"] > 0
