"""What bad input gets: one paragraph that names the file and line or the layer, exit code 2, nothing half-written."""

import json
import re
import struct
import zlib
from pathlib import Path

import pytest
from qe_pipelines import main

from tests.tiny import calibration, tiny_model

CLEAR = 400
"""A message is one paragraph of at most so many characters (temporary paths are long)."""


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    return tiny_model(root / "model"), calibration(root / "data")


@pytest.fixture
def quantize(good, tmp_path, monkeypatch, capsys):
    """Runs `qe-dist quantize` and returns what it printed to stderr; it must exit with 2 and write nothing."""
    model, data = good

    def call(model: Path = model, calibration: Path = data, recipe: str = "qe-w4a6", **options) -> str:
        words = ["quantize", str(model), "--recipe", recipe, "--calibration", str(calibration)]
        output = options.pop("output", tmp_path / "out")
        before = sorted(output.rglob("*")) if output.exists() else None
        words += ["--output", str(output), "--workers", "1"]
        words += [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        monkeypatch.setattr("sys.argv", ["qe-dist", *words])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == 2
        if before is None:
            assert not output.exists() or not any(output.rglob("*.safetensors"))
        else:
            assert sorted(output.rglob("*")) == before
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert len(message) < CLEAR + 4 * len(str(tmp_path))
        return message

    return call


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path / "model")


@pytest.fixture
def lines(tmp_path):
    """Writes a calibration file of these lines, the third of them as given."""

    def write(line) -> Path:
        path = calibration(tmp_path / "data")
        rows = path.read_text().splitlines()
        rows[2] = line if isinstance(line, str) else json.dumps(line)
        path.write_text("\n".join(rows))
        return path

    return write


# -- the model


def test_no_model(quantize, tmp_path):
    assert "config.json does not exist" in quantize(model=tmp_path / "nowhere")


def test_missing_shard(quantize, model):
    (model / "model.safetensors").unlink()
    assert "model.safetensors is missing" in quantize(model=model)


def test_truncated_shard(quantize, model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "may be truncated" in quantize(model=model)


def test_shard_that_lacks_a_tensor_of_its_index(quantize, model):
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "model.ghost": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "places model.ghost" in quantize(model=model)


def test_missing_tensor(quantize, model):
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.self_attn.o_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "no tensor model.layers.1.self_attn.o_proj.weight" in quantize(model=model)


def test_wrong_dtype(quantize, model):
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight has dtype I8" in quantize(model=model)


def test_unknown_architecture(quantize, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt9"}))
    said = quantize(model=model)
    assert "model_type 'gpt9'; supported are: " in said
    assert {"llama", "qwen2_vl"} <= set(re.findall(r"\w+", said))


def test_a_recipe_for_images_with_a_model_of_text(quantize, tmp_path):
    model = tiny_model(tmp_path / "llama", "llama")
    assert "is a model of text only, but transform masquant" in quantize(model=model, recipe="masquant-w4a6")


def test_config_that_is_not_json(quantize, model):
    (model / "config.json").write_text("{")
    assert "config.json is not JSON" in quantize(model=model)


# -- the recipe


def test_unknown_recipe_lists_the_names(quantize):
    assert "of rtn, smoothquant" in quantize(recipe="qe-w9")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('scheme = "w4a6"\ncolour = 1', "recipe has no 'colour'"),
        ('scheme = "w4a6"\n[compensation]\nname = "quant_experts"\nexperts = 4', "compensation has no 'experts'"),
        ('scheme = "w1a6"', "weight bits must be 2 to 8, found 1"),
        ('scheme = "w4a2"', "activation bits must be 3 to 8"),
        ('scheme = "4 bits"', "not of the form w4a8"),
        ('scheme = "w4a8g60"', "group size must be a positive multiple of 8, found 60"),
        ('scheme = "w4a8g48"', "group size 48 does not divide the 64 inputs of model.layers.0.self_attn.qkv"),
        ('scheme = "w4a6"\n[quantizer]\nname = "obq"\nwidest = 32', "qkv has 64 inputs, and obq takes 32"),
        ('scheme = "w4a6"\n[compensation]\nname = "magic"', "no compensation 'magic'; there are: aser, "),
        ('scheme = "w4a6"\n[transform]\nname = "masquant"', "transform masquant and compensation none do not go"),
        (
            'scheme = "w4a6"\n[compensation]\nname = "qera"\n[budget]\nextra_bits = 0.001\nfactor_bits = 8',
            "a budget of 0.001 bits per weight buys nothing: the scales of an adapter",
        ),
        ('scheme = "w4a6"\n[budget]\nrank = "many"', "budget.rank must be int, found 'many'"),
        ("scheme = ", "not TOML"),
    ],
)
def test_recipe_files(quantize, tmp_path, content, says):
    (tmp_path / "mine.toml").write_text(content)
    message = quantize(recipe=str(tmp_path / "mine.toml"))
    assert says in message
    of_the_model = ("does not divide", "buys nothing", "obq takes")  # what the recipe alone does not tell
    assert "mine.toml" in message or any(words in message for words in of_the_model)


# -- the calibration file


def test_a_recipe_for_images_with_no_image(quantize, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "The sun is warm."}\n')
    message = quantize(recipe="masquant-w4a6", calibration=tmp_path / "text.jsonl")
    assert "text.jsonl has no image, but transform masquant and compensation cross_modal" in message


def test_no_calibration_file(quantize, tmp_path):
    assert "none.jsonl does not exist" in quantize(calibration=tmp_path / "none.jsonl")


def test_no_usable_sample(quantize, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "no usable sample" in quantize(calibration=tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": ', "broken JSON"),
        ("[1, 2]", "expected a JSON object, found list"),
        ({"text": "  "}, "'text' is empty"),
        ({"prompt": "What?", "answer": ""}, "the answer is empty"),
        ({"image": "calibration/000.png", "prompt": "What?"}, "expected 'messages', 'text', or 'prompt' and 'answer'"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "there is no answer"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}, "a part must be"),
        ({"image": "gone.png", "prompt": "What?", "answer": "x"}, "gone.png does not exist"),
        ({"image": "https://example.com/a.png", "prompt": "What?", "answer": "x"}, "is remote"),
        ({"image": "calibration.jsonl", "prompt": "What?", "answer": "x"}, "is not an image"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(quantize, lines, line, says):
    message = quantize(calibration=lines(line))
    assert says in message
    assert "calibration.jsonl:3" in message


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("side", "says"), [(9000, "more than 64,000,000"), (100_000, "is too large")])
def test_image_bombs_are_refused_before_they_are_decoded(quantize, lines, tmp_path, side, says):
    path = lines({"image": "bomb.png", "prompt": "What?", "answer": "x"})
    (path.parent / "bomb.png").write_bytes(png(side, side, zlib.compress(b"\0" * 1000)))
    message = quantize(calibration=path)
    assert says in message
    assert "calibration.jsonl:3" in message


def test_an_image_that_breaks_off_is_named(quantize, lines):
    path = lines({"image": "torn.png", "prompt": "What?", "answer": "x"})
    whole = (path.parent / "calibration" / "000.png").read_bytes()
    (path.parent / "torn.png").write_bytes(whole[: len(whole) // 2])
    message = quantize(calibration=path)
    assert "torn.png is damaged" in message
    assert "calibration.jsonl:3" in message


# -- the output


def test_a_folder_that_is_not_ours_is_left_alone(quantize, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "is not a run of ours" in quantize(output=tmp_path / "mine")


def test_an_output_below_a_file(quantize, tmp_path):
    (tmp_path / "file").write_text("x")
    assert f"{tmp_path / 'file'} is a file; choose another" in quantize(output=tmp_path / "file" / "a" / "b")


def test_links_that_go_round_in_a_circle(quantize, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("model", "output", "calibration"):
        assert f"{name} {tmp_path / 'loop'} is no place on disk" in quantize(**{name: tmp_path / "loop"})


def test_resume_required_and_unknown_resume(quantize):
    assert "no run to continue" in quantize(resume="required")
    assert "resume must be auto, required or never" in quantize(resume="sometimes")


def test_a_mirror_that_is_no_url(quantize):
    assert "mirror must be a URL" in quantize(mirror="nowhere")


def test_numbers_out_of_range(quantize):
    assert "samples_per_batch must be at least 1, found 0" in quantize(samples_per_batch=0)


def test_no_ray_cluster_at_the_address(quantize):
    assert "no Ray cluster answers at 127.0.0.1:1" in quantize(ray_address="127.0.0.1:1")


def test_eval_of_nothing(good, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["qe-dist", "eval", str(tmp_path), "--data", str(good[1])])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert "config.json does not exist" in capsys.readouterr().err
