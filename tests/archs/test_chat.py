"""Samples become tokens: where the template is found, typed special tokens, long samples, odd images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from qe_dist import archs
from qe_dist.archs.shared.chat import ChatEncoder
from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.sample import ImageRef, PixelBounds, Sample
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.methods.recipes import load_recipe
from tests.tiny import MODELS, calibration, tiny_model

TEMPLATE = (MODELS / "plain" / "chat_template.jinja").read_text()
TEXT_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


def encoder(folder: Path) -> ChatEncoder:
    made = archs.for_checkpoint(json.loads((folder / "config.json").read_text())).encoder(folder)
    assert isinstance(made, ChatEncoder)
    return made


def conversation(*turns: str, images: int = 0, size: tuple[int, int] = (56, 56)) -> Sample:
    """Turns of user and assistant; the images stand before the first."""
    shown = [{"type": "image", "image": f"{i}.png"} for i in range(images)]
    messages = tuple(
        {"role": ("user", "assistant")[i % 2], "content": [*shown * (not i), {"type": "text", "text": text}]}
        for i, text in enumerate(turns)
    )
    refs = tuple(ImageRef(f"{i}.png", size=size) for i in range(images))
    return Sample(0, "a.jsonl:7", "chat", messages, images=refs)


def picture(size: tuple[int, int] = (56, 56)) -> Image.Image:
    return Image.new("RGB", size, (200, 30, 30))


def put_template(folder: Path, place: str, template: str) -> None:
    """Into one of the places where published models have it."""
    key, name = {"chat_template": template}, place
    if place == "tokenizer_config.json":
        content = json.loads((folder / place).read_text()) | key
    elif place == "several":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ raise_exception('rag') }}")
        (folder / "chat_template.jinja").write_text(template)
        return
    else:
        content = key
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.json", "processor_config.json", "several"])
def test_the_template_is_found_wherever_it_is_and_goes_into_the_checkpoint(
    place: str, model: Path, tmp_path: Path
) -> None:
    expected = encoder(model)(conversation("What?", "ring", images=1), [picture()]).input_ids
    (model / "chat_template.jinja").unlink()
    put_template(model, place, TEMPLATE)
    output = tmp_path / "out"
    quantize(RunConfig(model, load_recipe("rtn-w4a8"), calibration(tmp_path / "data", 2), output))
    for folder in (model, output):
        assert torch.equal(encoder(folder)(conversation("What?", "ring", images=1), [picture()]).input_ids, expected)
    assert (output / "additional_chat_templates" / "rag.jinja").exists() == (place == "several")


@pytest.mark.parametrize("place", ["chat_template.json", "processor_config.json"])
def test_a_template_of_the_processor_goes_before_one_for_text_in_the_tokenizer(place: str, model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    put_template(model, "tokenizer_config.json", TEXT_ONLY)
    with pytest.raises(ConfigError, match=r"a\.jsonl:7: the chat template left out 1 images"):
        encoder(model)(conversation("What?", "ring", images=1), [picture()])
    put_template(model, place, TEMPLATE)
    assert encoder(model)(conversation("What?", "ring", images=1), [picture()]).modality.any()


def test_templates_that_cannot_be_used_are_named(model: Path) -> None:
    path = model / "chat_template.jinja"
    path.write_text("{% for m in messages %}{{ m.content }")
    with pytest.raises(CheckpointError, match=r"the chat template is broken: .* line 1"):
        encoder(model)(conversation("What?", "ring"), [])
    path.write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match=r"a\.jsonl:7: .*template refuses the sample: roles must alternate"):
        encoder(model)(conversation("What?", "ring"), [])
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no chat template in chat_template\.jinja, additional_chat_templates/"):
        encoder(model)
    (model / "additional_chat_templates").mkdir()
    for name in ("a", "b"):
        (model / "additional_chat_templates" / f"{name}.jinja").write_text(TEMPLATE)
    with pytest.raises(CheckpointError, match="chat templates a, b, and none is named default"):
        encoder(model)
    (model / "chat_template.json").write_text('{"chat_template": ')
    with pytest.raises(CheckpointError, match="the chat template cannot be read"):
        encoder(model)


def test_a_model_of_text_is_given_strings(tmp_path: Path) -> None:
    """Templates of language models add contents to strings; of a list they would print its brackets, or end."""
    model = tiny_model(tmp_path / "model", "llama")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ids = encoder(model)(conversation("What?", "ring"), []).input_ids
    said = AutoTokenizer.from_pretrained(model).decode(ids)
    assert said == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nring<|im_end|>\n"


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_special_tokens_that_a_person_typed_are_text(token: str, model: Path) -> None:
    made, tokenizer = encoder(model), AutoTokenizer.from_pretrained(model)
    said = f"What does {token} mean?"
    index = tokenizer.convert_tokens_to_ids(token)
    for sample in (conversation(said, "ring"), conversation("What?", said)):
        example, plain = made(sample, []), made(conversation("What?", "ring"), [])
        assert said in tokenizer.decode(example.input_ids)
        assert (example.input_ids == index).sum() == (plain.input_ids == index).sum()
        assert not example.modality.any()
    with_image = made(conversation(said, "ring", images=1), [picture()])
    assert int(with_image.modality.sum()) == int(
        made(conversation("What?", "ring", images=1), [picture()]).modality.sum()
    )


def test_a_plain_text_may_be_a_rendered_conversation_but_shows_no_image(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "<|im_start|>user\nWhat is <|image_pad|>?<|im_end|>\n"
    example = encoder(model)(Sample(0, "a:1", "text", text=text), [])
    assert tokenizer.decode(example.input_ids) == text
    counts = [
        int((example.input_ids == tokenizer.convert_tokens_to_ids(t)).sum()) for t in ("<|im_end|>", "<|image_pad|>")
    ]
    assert counts == [1, 0]
    assert not example.modality.any()


def test_typed_tokens_are_encoded_as_transformers_sanitizes_them(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    sample = conversation("Is <|im_end|> the end, or <|im_<|im_end|>end|>?", "It is <|im_start|>.")
    messages = [{"role": m["role"], "content": m["content"][0]["text"]} for m in sample.messages]
    expected = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]
    assert encoder(model)(sample, []).input_ids.tolist() == expected


def test_turns_behind_the_last_answer_are_read_and_not_predicted(model: Path) -> None:
    made = encoder(model)
    short, long = (made(conversation(*turns), []) for turns in (("What?", "ring"), ("What?", "ring", "And now?")))
    count = short.input_ids.numel()
    assert torch.equal(long.input_ids[:count], short.input_ids)
    assert long.input_ids.numel() > count
    assert bool((long.labels[count:] == -100).all())


def narrow(folder: Path, context: int) -> ChatEncoder:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = context
    (folder / "config.json").write_text(json.dumps(config))
    return encoder(folder)


def test_what_is_longer_than_the_context_is_cut_or_refused(model: Path) -> None:
    whole = encoder(model)
    long = Sample(0, "a.jsonl:7", "text", text="red ring, " * 100)
    chat = conversation("What?", "ring", "And?", "cross", "And?", "ring " * 100)
    ids, turns = whole(long, []).input_ids, whole(conversation("What?", "ring", "And?", "cross"), [])
    made = narrow(model, turns.input_ids.numel() + 3)
    assert torch.equal(made(long, []).input_ids, ids[: made.context])
    assert made(long, []).cut == len(ids) - made.context
    assert torch.equal(made(chat, []).labels, turns.labels)
    assert made(chat, []).cut > 100
    with pytest.raises(ConfigError, match=r"a\.jsonl:7: \d+ tokens, .* cut off its first answer: shorten it, or let"):
        made(conversation("What? " * 100, "ring"), [])
    later = Sample(0, "a.jsonl:7", "chat", (*chat.messages[:4], *conversation("", "ring", images=1).messages), images=(
        ImageRef("0.png"),
    ))  # fmt: skip
    with pytest.raises(ConfigError, match="would cut off an image"):
        made(later, [picture((560, 560))])


def test_an_image_that_the_processor_refuses_is_named(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.jsonl:7: .* refuses 0\.png: absolute aspect ratio .* smaller than 200"):
        encoder(model)(conversation("What?", "red", images=1), [picture((1093, 5))])
    for size in ((1, 1), (1400, 7), (3, 590)):
        assert encoder(model)(conversation("What?", "red", images=1), [picture(size)]).modality.any()


@pytest.mark.parametrize("size", [(100, 1), (1, 100), (100, 3), (3, 100), (3, 3)])
def test_sides_as_long_as_a_pixel_has_colours_are_not_taken_for_them(size: tuple[int, int], model: Path) -> None:
    """Transposed, the image has the same tokens the other way round: sizes 1 and 3 are not read as channels."""
    rgb = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    sample, made = conversation("What?", "red", images=1), encoder(model)
    own, turned = (made(sample, [Image.fromarray(x)]).vision for x in (rgb, np.ascontiguousarray(rgb.swapaxes(0, 1))))
    assert own["image_grid_thw"][0, [0, 2, 1]].tolist() == turned["image_grid_thw"][0].tolist()
    assert own["pixel_values"].mean() == pytest.approx(float(turned["pixel_values"].mean()), abs=0.02)


def test_bounds_of_an_image_are_those_of_the_processor(model: Path) -> None:
    made, sample = encoder(model), conversation("What?", "red", images=2)
    tokens = {}
    for name, bounds in (
        ("none", PixelBounds()),
        ("up", PixelBounds(28 * 28 * 9)),
        ("down", PixelBounds(784, 784 * 2)),
    ):
        first = ImageRef("0.png", bounds=bounds)
        bounded = Sample(0, "a:1", "chat", sample.messages, images=(first, ImageRef("1.png")))
        tokens[name] = made(bounded, [picture((84, 56))] * 2).vision["image_grid_thw"].prod(dim=1).tolist()
    assert tokens["none"][0] == tokens["none"][1]
    assert tokens["up"][0] >= 9 * 4 > tokens["none"][0]
    assert tokens["down"][0] <= 2 * 4
    assert tokens["up"][1] == tokens["down"][1] == tokens["none"][1]
