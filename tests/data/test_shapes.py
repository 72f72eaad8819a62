"""The forms that people have become one; what has no plain meaning is refused by file, line and key."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qe_dist.core.errors import ConfigError
from qe_dist.core.sample import PixelBounds
from qe_dist.data.options import ReadOptions
from qe_dist.data.samples import Reading, load_images, read
from tests.tiny import DATA

ANSWER = {"role": "assistant", "content": "ring"}
TEXT, IMAGE = {"type": "text", "text": "What is it?"}, {"type": "image", "image": "a.png"}
IN_BASE64 = base64.b64encode((DATA / "calibration" / "000.png").read_bytes()).decode()


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, image in (("a.png", "000.png"), ("b.png", "001.png")):
        shutil.copyfile(DATA / "calibration" / image, tmp_path / name)
    return tmp_path


def reading(folder: Path, record: Any, **options: Any) -> Reading:
    path = folder / "d.jsonl"
    path.write_text('{"text": "first"}\n' + json.dumps(record) + "\n")
    return read(path, ReadOptions(**options))


def said(found: Reading) -> list[tuple[str, list[str]]]:
    messages = found.samples[1].messages
    return [(m["role"], [part.get("text", "[image]") for part in m["content"]]) for m in messages]


ONE_IMAGE: dict[str, Any] = {
    "parts": {"messages": [user(IMAGE, TEXT), ANSWER]},
    "a list without a name": [user(IMAGE, TEXT), ANSWER],
    "question and answer": {"image": "a.png", "question": "What is it?", "answer": "ring"},
    "prompt and completion": {"image": "a.png", "prompt": "What is it?", "completion": "ring"},
    "OpenAI's image_url": {"messages": [user({"type": "image_url", "image_url": {"url": "a.png"}}, TEXT), ANSWER]},
    "OpenAI's responses": {"messages": [user({"type": "input_image", "image_url": "a.png"},
                                             {"type": "input_text", "text": "What is it?"}), ANSWER]},
    "Anthropic's source": {"messages": [user({"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                                                          "data": IN_BASE64}}, TEXT), ANSWER]},
    "transformers' url": {"messages": [user({"type": "image", "url": "a.png"}, TEXT), ANSWER]},
    "transformers' base64": {"messages": [user({"type": "image", "base64": IN_BASE64}, TEXT), ANSWER]},
    "Ollama's images": {"messages": [{"role": "user", "content": "What is it?", "images": [IN_BASE64]}, ANSWER]},
    "data address": {"messages": [user(IMAGE | {"image": f"data:image/png;base64,{IN_BASE64}"}, TEXT), ANSWER]},
    "base64 in a column": {"image": IN_BASE64, "question": "What is it?", "answer": "ring"},
    "LLaVA": {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                  {"from": "gpt", "value": "ring"}]},
    "ShareGPT without a mark": {"images": ["a.png"], "conversations": [{"from": "human", "value": "What is it?"},
                                                                       {"from": "gpt", "value": "ring"}]},
    "messages with a mark": {"messages": [{"role": "user", "content": "<image>What is it?"}, ANSWER],
                             "images": ["a.png"]},
    "a part that is a place": {"messages": [user({"type": "image"}, TEXT), ANSWER], "images": ["a.png"]},
    "a part with null": {"messages": [user({"type": "image", "text": None}, {**TEXT, "image": None}), ANSWER],
                         "images": [{"bytes": None, "path": "a.png"}]},
    "JSON in a text": {"image": "a.png", "messages": json.dumps([{"role": "user", "content": "What is it?"}, ANSWER])},
    "an object of lists": {"image": "a.png", "conversations": {"from": ["human", "gpt"],
                                                               "value": ["<image>What is it?", "ring"]}},
    "The Cauldron": {"images": ["a.png"], "texts": [{"user": "What is it?", "assistant": "ring"}]},
    "a mark in a prompt": {"image": "a.png", "prompt": "<image>\nWhat is it?", "answer": "ring"},
}  # fmt: skip


@pytest.mark.parametrize("form", ONE_IMAGE)
def test_forms_of_one_sample_with_an_image_are_the_same(form: str, folder: Path) -> None:
    found = reading(folder, ONE_IMAGE[form])
    assert said(found) == [("user", ["[image]", "What is it?"]), ("assistant", ["ring"])]
    assert found.fingerprint == reading(folder, ONE_IMAGE["parts"]).fingerprint
    assert found.notes == []
    assert found.samples[1].kind == "image"


OTHERS: dict[str, tuple[Any, list[tuple[str, list[str]]]]] = {
    "caption": ({"image": "a.png", "text": "A ring."}, [("user", ["[image]", "Describe the image."]),
                                                         ("assistant", ["A ring."])]),
    "several pairs": ({"image": "a.png", "texts": [{"user": "A?", "assistant": "b"}, {"user": "C?", "assistant": "d"}]},
                      [("user", ["[image]", "A?"]), ("assistant", ["b"]), ("user", ["C?"]), ("assistant", ["d"])]),
    "several images": ({"image": ["a.png", "b.png"], "prompt": "What?", "answer": "ring"},
                       [("user", ["[image]", "[image]", "What?"]), ("assistant", ["ring"])]),
    "no image": ({"image": None, "prompt": "2+2?", "answer": 4}, [("user", ["2+2?"]), ("assistant", ["4"])]),
    "a list of one answer": ({"question": "What?", "answer": ["ring"]}, [("user", ["What?"]), ("assistant", ["ring"])]),
    "Alpaca": ({"instruction": "Add.", "input": "1, 2", "output": "3"},
               [("user", ["Add.\n1, 2"]), ("assistant", ["3"])]),
    "a system prompt": ({"system_prompt": "Be short.", "question": "What?", "response": "ring"},
                        [("system", ["Be short."]), ("user", ["What?"]), ("assistant", ["ring"])]),
    "an empty system prompt": ({"conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "What?"},
                                                  {"from": "gpt", "value": "ring"}]},
                               [("system", []), ("user", ["What?"]), ("assistant", ["ring"])]),
    "marks in their places": ({"images": ["a.png", "b.png"], "conversations": [
        {"from": "human", "value": "Is <image> as\n<image>\n?"}, {"from": "gpt", "value": "no"}]},
        [("user", ["Is ", "[image]", " as", "[image]", "?"]), ("assistant", ["no"])]),
    "marks over turns": ({"images": ["a.png", "b.png"], "messages": [
        {"role": "user", "content": "<image>A?"}, ANSWER, {"role": "user", "content": "B?<image>"}, ANSWER]},
        [("user", ["[image]", "A?"]), ("assistant", ["ring"]), ("user", ["B?", "[image]"]), ("assistant", ["ring"])]),
    "a mark without an image": ({"prompt": "What is <image> in HTML?", "answer": "nothing"},
                                [("user", ["What is <image> in HTML?"]), ("assistant", ["nothing"])]),
    "a last question": ({"messages": [user(TEXT), ANSWER, user(TEXT)]},
                        [("user", ["What is it?"]), ("assistant", ["ring"]), ("user", ["What is it?"])]),
    "null where others have something": ({"messages": [{**user(TEXT), "tool_calls": None, "name": None}, ANSWER]},
                                         [("user", ["What is it?"]), ("assistant", ["ring"])]),
}  # fmt: skip


@pytest.mark.parametrize("form", OTHERS)
def test_other_forms_are_read(form: str, folder: Path) -> None:
    record, expected = OTHERS[form]
    found = reading(folder, record)
    assert said(found) == expected
    assert len(load_images(found.samples[1])) == sum(parts.count("[image]") for _, parts in expected)
    assert found.notes == []


REFUSED: dict[str, tuple[Any, str]] = {
    "no answer": ({"messages": [user(IMAGE, TEXT)]}, "there is no answer"),
    "a text that is no conversation": ({"messages": "hello"}, "'messages' must be a list"),
    "lists of unlike length": ({"messages": {"role": ["user"], "content": []}}, "'messages' must be a list"),
    "no caption": ({"image": "a.png", "caption": []}, "'caption' is empty"),
    "empty answer": ({"prompt": "What?", "answer": " "}, "the answer is empty"),
    "null": ({"messages": [{"role": "user", "content": None}, ANSWER]}, "'content' must be a text, found NoneType"),
    "empty question": ({"messages": [{"role": "user", "content": ""}, ANSWER]}, "a message of the user is empty"),
    "no parts": ({"messages": [user(), ANSWER]}, "a message of the user is empty"),
    "role": ({"messages": [{"role": "narrator", "content": "x"}, ANSWER]}, "role 'narrator' is unknown"),
    "number as a role": ({"messages": [{"role": 3, "content": "x"}, ANSWER]}, "role 3 is unknown"),
    "no role": ({"messages": [{"content": "x"}, ANSWER]}, "needs 'role' and 'content'"),
    "tool call": ({"messages": [user(TEXT), {**ANSWER, "tool_calls": [{}]}]}, "'tool_calls': calls of tools are not"),
    "tools": ({"messages": [user(TEXT), ANSWER], "tools": [{"name": "f"}]}, "has 'tools'"),
    "video part": ({"messages": [user({"type": "video", "video": "v.mp4"}), ANSWER]}, "a part must be"),
    "video": ({"video": "v.mp4", "prompt": "What?", "answer": "x"}, "has 'video': only images and text"),
    "choices": ({"question": "What?", "choices": ["a", "b"], "answer": 1}, "has 'choices': .*--columns unused=choices"),
    "fewer marks": ({"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "<image>A"}, ANSWER]},
                    r"2 images, but 1 places \(<image>\)"),
    "more marks": ({"image": "a.png", "prompt": "<image><image>", "answer": "x"}, "1 images, but 2 places"),
    "place without image": ({"messages": [user({"type": "image"}, TEXT), ANSWER]}, "there is no image for"),
    "images and no user": ({"image": "a.png", "messages": [ANSWER]}, "no message of a user to show them in"),
    "a slip": ({"imgae": "a.png", "prompt": "What?", "answer": "x"}, "has 'imgae'; is 'image' meant"),
    "an image by another name": ({"photo": "a.png", "prompt": "What?", "answer": "x"}, "'photo' looks like an image"),
    "two questions": ({"prompt": "A?", "question": "B?", "answer": "x"}, "has 'question' and 'prompt', of which one"),
    "two places of images": ({"image": "a.png", "images": ["b.png"], "text": "x"}, "has 'image' and 'images'"),
    "answers": ({"question": "What?", "answers": ["a", "b"]}, "expected 'messages', 'text', or 'prompt' and 'answer'"),
    "list of answers": ({"question": "What?", "answer": ["a", "b"]}, "'answer' must be a text, found list"),
    "boolean": ({"question": "What?", "answer": True}, "'answer' must be a text, found bool"),
    "caption with a mark": ({"image": "a.png", "text": "<image> A ring"}, "'text' has <image> in it"),
    "folder": ({"image": ".", "prompt": "What?", "answer": "x"}, "is a folder"),
    "absent": ({"image": "file:///gone/a.png", "prompt": "What?", "answer": "x"}, "image /gone/a.png does not exist"),
    "another host": ({"image": "file://host/a.png", "prompt": "What?", "answer": "x"}, "on the host host"),
    "remote": ({"image": "http://example.com/a.png", "prompt": "What?", "answer": "x"}, "is remote.*--allow-remote"),
    "bucket": ({"image": "s3://b/a.png", "prompt": "What?", "answer": "x"}, "only http and https"),
    "bad base64": ({"image": "data:image/png;base64,%%%", "prompt": "What?", "answer": "x"}, "base64 is damaged"),
    "no comma": ({"image": "data:image/png;base64", "prompt": "What?", "answer": "x"}, "it has no comma"),
    "long name": ({"image": "x" * 5000, "prompt": "What?", "answer": "x"}, "File name too long"),
    "image of a number": ({"image": 3, "prompt": "What?", "answer": "x"}, "must be a path, an address or bytes"),
    "bounds": ({"image": "a.png", "text": "x", "min_pixels": 9, "max_pixels": 3}, "min_pixels 9 is more than max_pix"),
    "bounds of text": ({"image": "a.png", "text": "x", "min_pixels": "9"}, "'min_pixels' must be a whole number"),
    "scalar": (3, "expected a JSON object, found int"),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_what_has_no_plain_meaning_is_refused_by_file_and_line(form: str, folder: Path) -> None:
    record, says = REFUSED[form]
    with pytest.raises(ConfigError, match=rf"(?s)d\.jsonl:2: .*{says}") as found:
        reading(folder, record)
    assert len(str(found.value)) < 400 + 2 * len(str(folder))


def test_keys_that_are_not_used_are_counted(folder: Path) -> None:
    record = {
        "prompt_id": 7, "prompt": "again", "conversation_id": "x",
        "messages": [{**user({**IMAGE, "detail": "low"}), "weight": 1}, ANSWER],
    }  # fmt: skip
    (line,) = reading(folder, record).notes
    assert line.endswith(
        "keys that are not used: a part's detail (1), conversation_id (1), messages[].weight (1), prompt (1), "
        "prompt_id (1)"
    )


def test_of_several_captions_the_first_is_taken_and_the_others_counted(folder: Path) -> None:
    found = reading(
        folder, {"image": "a.png", "caption": ["A ring.", "A circle."], "filename": "a.jpg", "sentids": [1]}
    )
    assert said(found)[1] == ("assistant", ["A ring."])
    assert found.notes[0].endswith("not used: another caption (1), filename (1), sentids (1)")


def test_columns_say_what_things_are_called(folder: Path) -> None:
    record = {"query_text": "What is it?", "reply": "ring", "photo": "a.png", "answer": "another", "choices": [1]}
    columns = (("question", "query_text"), ("answer", "reply"), ("image", "photo"), ("unused", "choices"))
    found = reading(folder, record, columns=columns)
    assert said(found) == [("user", ["[image]", "What is it?"]), ("assistant", ["ring"])]
    with pytest.raises(ConfigError, match=r"--columns quest=\.\.\.: we read messages, "):
        reading(folder, record, columns=(("quest", "query_text"),))


def test_bounds_of_part_record_and_option(folder: Path) -> None:
    part = {"messages": [user({**IMAGE, "min_pixels": 50176}, IMAGE, TEXT), ANSWER], "max_pixels": 90000}
    found = reading(folder, part, bounds=PixelBounds(784, 10**6))
    assert [image.bounds for image in found.samples[1].images] == [PixelBounds(50176, 90000), PixelBounds(784, 90000)]
    assert found.fingerprint != reading(folder, part).fingerprint


def test_relative_paths_begin_at_the_file_or_where_an_option_says(folder: Path) -> None:
    (folder / "images").mkdir()
    shutil.move(folder / "a.png", folder / "images" / "a b ü.png")
    name = (folder / "images" / "a b ü.png").as_uri()
    record = {"image": "a b ü.png", "prompt": "What?", "answer": "ring"}
    assert reading(folder, record, image_root=folder / "images").samples[1].images[0].path.is_file()
    assert reading(folder, record | {"image": name}).samples[1].images[0].path.is_file()
    with pytest.raises(ConfigError, match="does not exist"):
        reading(folder, record)
