"""Every architecture file: block by block equals the Hugging Face model, and nothing of it is lost."""

import json
import shutil

import pytest

from qe_dist import archs
from qe_dist.core.errors import CheckpointError
from qe_dist.data.samples import load_images
from qe_dist.io.weights import SafetensorsSource
from tests.archs.contract import CONTRACT, Subject, every_tensor_is_claimed_once, streamed_equals_whole_bit_for_bit
from tests.tiny import samples_for

SAVED_OTHERWISE = ("qwen2_vl", "qwen2_5_vl")
"""Families that transformers saves again under other names than the published ones."""
NAMED_BY_OTHERS = ("qwen3_5_text",)
"""Families whose second names are not those of transformers; `test_qwen3_5.py` has files with them."""


@pytest.fixture(scope="module", params=archs.names())
def subject(request, tmp_path_factory):
    return Subject.of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
def test_promise(promise, subject):
    promise(subject)


def test_labels_are_the_answers_and_their_end_marks(subject):
    folder = subject.source.folder
    encoder = subject.arch.encoder(folder)
    sample = samples_for(folder)[0]
    example = encoder(sample, load_images(sample))
    answer = example.labels[example.labels != -100]
    expected = sample.messages[1]["content"][0]["text"] + encoder.tokenizer.eos_token
    assert encoder.tokenizer.decode(answer) == expected
    prompt = encoder.prompt(sample, load_images(sample))
    assert (example.input_ids[: prompt.input_ids.numel()] == prompt.input_ids).all()


def test_no_family_with_several_names_is_left_out():
    several = {name for name in archs.names() if any(len(on) > 1 for on in archs.get(name).on_disk.values())}
    assert several == {*SAVED_OTHERWISE, *NAMED_BY_OTHERS}


@pytest.mark.parametrize("name", SAVED_OTHERWISE)
def test_names_as_published_and_as_saved_again_are_told_apart(name, tmp_path):
    """By the files alone: the same model saved again by transformers under the names that it has in memory."""
    subject = Subject.of(name, tmp_path / "published")
    folder = shutil.copytree(subject.source.folder, tmp_path / "again")
    subject.whole.save_pretrained(folder, save_original_format=False)
    again = Subject(subject.arch, SafetensorsSource(folder), subject.whole, subject.examples)
    assert not {*again.source.names()} & {*subject.source.names()} - {"lm_head.weight"}
    every_tensor_is_claimed_once(again)
    streamed_equals_whole_bit_for_bit(again)


def test_a_shape_that_contradicts_the_config_is_named(subject, tmp_path):
    folder = shutil.copytree(subject.source.folder, tmp_path / "wrong")
    (folder / "config.json").write_text(json.dumps(subject.arch.widened(subject.source.config, 128)))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.gate_proj.*\(96, 64\).*\(128, 64\)"):
        subject.arch.spec(SafetensorsSource(folder))
