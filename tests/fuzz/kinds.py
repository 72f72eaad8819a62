"""Inputs as broken as files and command lines get, by kind, and what must come of each: a right result, or one clear
line of ours, soon, and nothing written."""

import io
import json
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from PIL import Image
from qe_pipelines import main
from qe_pipelines.help import EXAMPLES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.main import get_command

from qe_dist.core.errors import QEError
from qe_dist.data.samples import load_images, read_samples
from qe_dist.methods import FOLDERS, names
from qe_dist.methods.recipes import METHODS, SCHEMES, load_recipe, recipe_from
from qe_dist.model import open_model
from tests.tiny import tiny_model

COMMANDS = get_command(main.app).commands

SECONDS = 20.0
"""Most that one input may take of a processor: other programs on the machine are no fault of it."""
CLEAR = 900
"""Most characters of a message, beside the paths in it."""
RIGHT, REFUSED = "right result", "one clear line"


@dataclass(frozen=True)
class Kind:
    """inputs: draws one. check: returns which outcome it came to, and raises for one that is neither."""

    inputs: st.SearchStrategy[Any]
    check: Callable[["Place", Any], str]


class Place:
    """A folder of its own for a kind, with a model in it, which is as it was before each input."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = tiny_model(root / "model")
        tensors = load_file(self.model / "model.safetensors")
        self.files = {path.name: path.read_bytes() for path in self.model.iterdir()}
        half = len(tensors) // 2
        parts = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(tensors.items())[i * half :]) for i in (0, 1)}
        first, second = parts
        for name in parts[second]:
            parts[first].pop(name, None)
        self.sharded = root / "sharded"
        shutil.copytree(self.model, self.sharded)
        (self.sharded / "model.safetensors").unlink()
        for shard, part in parts.items():
            save_file(part, self.sharded / shard, metadata={"format": "pt"})
        placed = {name: shard for shard, part in parts.items() for name in part}
        (self.sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))

    @contextmanager
    def changed(self, file: Path, content: bytes) -> Iterator[Path]:
        """The file with another content, for a moment."""
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(content)
        try:
            yield file
        finally:
            if before is None:
                file.unlink()
            else:
                file.write_bytes(before)


def judged(place: Place, call: Callable[[], Any], right: Callable[[Any], None]) -> str:
    """What came of a call. Raises AssertionError for a message that is not one line, for slowness, and for anything
    left on disk; and whatever `call` raises that is no error of ours."""
    before, begin = set(place.root.rglob("*")), time.process_time()
    try:
        result = call()
    except QEError as error:
        outcome, said = REFUSED, str(error)
        assert said.strip(), "no word"
        assert "\n" not in said, f"not one line: {said!r}"
        assert len(said.replace(str(place.root), "")) <= CLEAR, f"{len(said)} characters: {said}"
        assert "Traceback" not in said
    else:
        outcome = RIGHT
        right(result)
    assert time.process_time() - begin < SECONDS, "slow"
    assert set(place.root.rglob("*")) == before, "something was written"
    return outcome


# -- how contents are broken


@st.composite
def broken_bytes(draw: Any, whole: bytes) -> bytes:
    """A content with a few bytes changed, left out or put in, or cut off; mostly near its beginning."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        near = draw(st.sampled_from([8, 64, 4096, len(content)]))
        at = draw(st.integers(0, max(0, min(near, len(content)) - 1)))
        match draw(st.sampled_from(["set", "set", "insert", "delete", "cut", "repeat", "append"])):
            case "set":
                content[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del content[at : at + draw(st.integers(1, 16))]
            case "cut":
                del content[at:]
            case "repeat":
                content[at:at] = content[at : at + 64]
            case "append":
                content += draw(st.binary(min_size=1, max_size=64))
    return bytes(content)


ODD = st.sampled_from([
    None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 2**64, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    " ", "x", "0", "-1", "\ud800", "\0", "a" * 5000, "../../x", "<|image_pad|>", [], {}, [[]], [None], [1, 2, 3],
    {"": {}}, {"type": "x"}, [{"role": "user"}],
])  # fmt: skip
SIMPLE = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=20)
NESTED = st.recursive(
    SIMPLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
VALUES = ODD.map(deepcopy) | NESTED  # else a change of one input would be in the next


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


@st.composite
def broken_json(draw: Any, whole: Any) -> Any:
    """A JSON value with a few entries replaced, left out, renamed or added."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        paths = sorted(_places(value), key=repr)
        if not paths:
            return draw(VALUES)
        *before, last = draw(st.sampled_from(paths))
        inner = value
        for key in before:
            inner = inner[key]
        change = draw(st.sampled_from(["set", "set", "set", "remove", "rename", "add"]))
        if change == "set" or not isinstance(inner, dict):
            inner[last] = draw(VALUES)
        elif change == "remove":
            del inner[last]
        elif change == "rename":
            inner[draw(st.text(max_size=12))] = inner.pop(last)
        else:
            inner[draw(st.text(max_size=12))] = draw(VALUES)
    return value


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


# -- the kinds


def _loads(opened: Any) -> None:
    """transformers loads what was accepted, whole; every tensor can be read."""
    source = opened.source
    for name in source.names():
        assert tuple(source.get(name).shape) == source.shape(name)


def headers(place: Place, drawn: tuple[str, Any]) -> str:
    """drawn: bytes of a whole shard or index, or changes of a header."""
    what, content = drawn
    folder = place.sharded if what == "index" else place.model
    file = folder / ("model.safetensors.index.json" if what == "index" else "model.safetensors")
    if what == "header":
        content = _with_header(place.files["model.safetensors"], content)

    def right(opened: Any) -> None:
        if what != "index":
            with safe_open(file, framework="pt") as held:
                assert set(opened.source.names()) <= set(held.keys())
        _loads(opened)

    with place.changed(file, content):
        return judged(place, lambda: open_model(folder), lambda opened: _unless_nan(lambda: right(opened)))


def _unless_nan(right: Callable[[], None]) -> None:
    """A changed byte may make a number that is none, which the tensor that has it tells when it is read."""
    try:
        right()
    except QEError as error:
        if "NaN or Inf" not in str(error):
            raise


def _with_header(whole: bytes, header: Any) -> bytes:
    length = 8 + int.from_bytes(whole[:8], "little")
    text = as_json(header)
    return len(text).to_bytes(8, "little") + text + whole[length:]


def configs(place: Place, config: Any) -> str:
    """An accepted config makes a model that transformers loads without a word about tensors."""

    def right(opened: Any) -> None:
        with torch.device("meta"):
            settings = opened.arch.hf_config(opened.source.config)
            made = opened.arch.auto_class().from_config(settings)
        assert made.num_parameters() > 0
        opened.arch.spec(opened.source)

    with place.changed(place.model / "config.json", as_json(config)):
        return judged(place, lambda: open_model(place.model), right)


def samples(place: Place, lines: bytes) -> str:
    """An accepted file is encoded by the model's own tokenizer, sample by sample."""
    encoder = _encoder(place)
    path = place.root / "samples.jsonl"

    def read() -> list[int]:
        found = read_samples(path)
        return [encoder(sample, load_images(sample)).input_ids.numel() for sample in found]

    def right(lengths: list[int]) -> None:
        assert lengths
        assert min(lengths) > 0

    with place.changed(path, lines):
        return judged(place, read, right)


def _encoder(place: Place) -> Any:
    if not hasattr(place, "encoder"):
        opened = open_model(place.model)
        place.encoder = opened.arch.encoder(place.model)  # type: ignore[attr-defined]
    return place.encoder  # type: ignore[attr-defined]


def images(place: Place, content: bytes) -> str:
    """An accepted image is RGB, and the same each time it is decoded."""
    path, line = place.root / "image.bin", {"image": "image.bin", "prompt": "What?", "answer": "That."}
    listed = place.root / "images.jsonl"

    def read() -> list[Image.Image]:
        (sample,) = read_samples(listed)
        return [load_images(sample)[0] for _ in range(2)]

    def right(pictures: list[Image.Image]) -> None:
        one, other = pictures
        assert one.mode == "RGB"
        assert min(one.size) > 0
        assert one.tobytes() == other.tobytes()

    with place.changed(path, content), place.changed(listed, as_json(line)):
        return judged(place, read, right)


def recipes(place: Place, drawn: tuple[str, str]) -> str:
    """An accepted recipe is what its own description says."""
    what, text = drawn
    path = place.root / "mine.toml"

    def right(recipe: Any) -> None:
        assert recipe_from(recipe.describe()) == recipe

    if what == "name":
        return judged(place, lambda: load_recipe(text), right)
    with place.changed(path, text.encode("utf-8", "surrogatepass")):
        return judged(place, lambda: load_recipe(str(path)), right)


def options(place: Place, words: list[str]) -> str:
    """Words of a command line, none of which names data that is there: exit code 2 and a line, or help."""
    out, err = io.StringIO(), io.StringIO()
    before, begin = set(place.root.rglob("*")), time.process_time()
    told = redirect_stdout(out), redirect_stderr(err)
    with chdir(place.root), told[0], told[1], mock.patch("sys.argv", ["qe-dist", *words]):
        code = main._run(*main._debugged(words))
    lines = [line for line in err.getvalue().splitlines() if line]
    assert time.process_time() - begin < SECONDS, "slow"
    assert set(place.root.rglob("*")) == before, "something was written"
    assert code in (0, 2), (code, lines)
    if code == 0:
        assert out.getvalue()
        return RIGHT
    assert len(lines) == 1 or not words or "--debug" in words, lines
    return REFUSED


def _picture(form: str) -> bytes:
    file = io.BytesIO()
    picture = Image.linear_gradient("L").resize((24, 16)).convert("P" if form == "GIF" else "RGB")
    picture.save(file, form)
    return file.getvalue()


HEADER_BASE = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b": {"dtype": "F32", "shape": [4], "data_offsets": [12, 28]},
}
LINES = (
    {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A fruit."},
    ]},
    {"text": "The sun is warm."},
    {"prompt": "What is an apple?", "answer": "A fruit."},
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]},
)  # fmt: skip
TABLES = (
    'scheme = "w4a6"\n[transform]\nname = "smoothquant"\nalpha = 0.5\n[compensation]\nname = "qera"\n'
    "[budget]\nrank = 8\n",
    'scheme = "w4a8g64"\ngranularity = "linear"\n[quantizer]\nname = "gptq"\n'
    "[budget]\nextra_bits = 0.5\nfactor_bits = 4\n",
    'scheme = "w3a16g128"\n[rotation]\nname = "hadamard"\n[channels]\nname = "lists"\n'
    '[compensation]\nname = "quant_experts"\n',
)
WORDS = (
    *EXAMPLES, "--recipe", "--calibration", "--output", "--data", "--json", "--seed", "--workers", "--memory",
    "--device", "--tensor-parallel-size", "--from-block", "--help", "--version", "--debug", "--list", "--once",
    "--revision", "--log-file", "--", "-x", "--seed=", "nowhere", "--no-quiet",
)  # fmt: skip
GIVEN = (
    "", " ", "\udcff", "nowhere", "nowhere.jsonl", "/proc/nowhere", "/dev/null", "rtn-w4a8", "qe-w4a6@0.5", "-1", "0",
    "1", "1e9", "nan", "20GiB", "cuda", "cpu", "auto", "never", "s3x://nowhere", "a/b", "file:///nowhere", "main",
    "1,2", "x" * 300,
)  # fmt: skip
STARTED = ("demo", "submit", "serve", "--log-file", "--ray-address")
"""Words that begin work, join a cluster or write a file whatever stands beside them."""
NEEDED = {
    "quantize": ("MODEL", "--recipe", "rtn-w4a8", "--calibration", "nowhere.jsonl", "--output", "nowhere/out"),
    "compare": (
        "MODEL", "--recipes", "rtn-w4a8", "--calibration", "nowhere.jsonl", "--data", "nowhere.jsonl", "--output",
        "nowhere/out",
    ),
    "eval": ("MODEL", "--data", "nowhere.jsonl"),
    "sensitivity": ("MODEL", "--data", "nowhere.jsonl"),
    "verify": ("MODEL",),
    "export": ("MODEL", "--base-only", "--output", "nowhere/out"),
    "status": ("MODEL",),
}  # fmt: skip
"""Words with which a command comes as far as its data, which are not there."""


@st.composite
def command_lines(draw: Any, model: Path) -> list[str]:
    """A command with what it needs, and some of its options with any values; or any words at all."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.lists(st.sampled_from(WORDS) | st.sampled_from(GIVEN) | st.text(max_size=6), max_size=8))
    name = draw(st.sampled_from(sorted(NEEDED)))
    words = [name, *(str(model) if word == "MODEL" else word for word in NEEDED[name])]
    own = [p for p in COMMANDS[name].params if p.opts[0].startswith("--") and p.opts[0] not in STARTED]
    for parameter in draw(st.lists(st.sampled_from(own), max_size=3)):
        words.append(parameter.opts[0])
        if not getattr(parameter, "is_flag", False):
            words.append(draw(st.sampled_from(GIVEN)))
    for _ in range(draw(st.integers(0, 1))):
        words[draw(st.integers(1, len(words) - 1))] = draw(st.sampled_from(GIVEN))
    return words


def kinds(place: Place) -> dict[str, Kind]:
    """All of them, for a folder with a model."""
    config = json.loads(place.files["config.json"])
    weights, index = place.files["model.safetensors"], (place.sharded / "model.safetensors.index.json").read_bytes()
    length = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:length])
    text = st.sampled_from(LINES)
    line = text.flatmap(lambda one: broken_json(one).map(as_json) | broken_bytes(as_json(one)))
    members = [*METHODS, *(name for axis in FOLDERS for name in names(axis)), "none", "qe-", "+", "x"]
    parts = st.lists(st.sampled_from(members), min_size=1, max_size=4).map("+".join)
    form = st.sampled_from([*SCHEMES, "w4a8g64", "w1a6", "w4", "a8", "w99a99g7", ""])
    bits = st.sampled_from(["", "@0.5", "@0.25f4", "@", "@nan", "@-1", "@1e999", "@0.5f3", "@f", "@0.5f4f4"])
    named = st.tuples(parts, form, bits).map(lambda p: f"{p[0]}-{p[1]}{p[2]}") | st.text(max_size=30)
    toml = st.sampled_from(TABLES).flatmap(
        lambda whole: (
            broken_bytes(whole.encode()).map(lambda b: b.decode("utf-8", "replace"))
            | broken_json(tomllib.loads(whole)).map(_as_toml)
        )
    )
    return {
        "safetensors headers and indexes": Kind(
            st.tuples(st.just("bytes"), broken_bytes(weights))
            | st.tuples(st.just("header"), broken_json(header))
            | st.tuples(st.just("index"), broken_json(json.loads(index)).map(as_json) | broken_bytes(index)),
            headers,
        ),
        "configs": Kind(broken_json(config), configs),
        "samples": Kind(st.lists(line, min_size=1, max_size=3).map(b"\n".join), samples),
        "images": Kind(
            st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]).flatmap(
                lambda form: broken_bytes(PICTURES[form])
            ),
            images,
        ),
        "recipes": Kind(st.tuples(st.just("name"), named) | st.tuples(st.just("file"), toml), recipes),
        "option strings": Kind(command_lines(place.model).map(_harmless), options),
    }


def _harmless(words: list[str]) -> list[str]:
    return [word for word in words if word not in STARTED]


PICTURES = {form: _picture(form) for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")}


def _as_toml(value: Any) -> str:
    """A table as TOML, as far as it can be said there: what cannot is a fault of the file."""
    if not isinstance(value, dict):
        return str(value)
    plain = [f"{json.dumps(str(k))} = {_scalar(v)}" for k, v in value.items() if not isinstance(v, dict)]
    tables = [f"[{json.dumps(str(k))}]\n{_as_toml(v)}" for k, v in value.items() if isinstance(v, dict)]
    return "\n".join([*plain, *tables])


def _scalar(value: Any) -> str:
    return str(value) if isinstance(value, float) else json.dumps(value)
