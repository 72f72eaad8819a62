"""`qe-dist eval`: what it refuses, before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from qe_pipelines import main

from qe_dist.checkpoint import evaluate as evaluation
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.methods.recipes import load_recipe
from tests.tiny import calibration, tiny_model


@pytest.fixture(scope="module")
def given_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("eval")
    model, data = tiny_model(root / "model"), calibration(root / "data", 4)
    quantize(RunConfig(model, load_recipe("rtn-w4a8"), data, root / "rtn", sample_tokens=256))
    return {"model": model, "data": data, "rtn": root / "rtn"}


@pytest.fixture
def call(
    given_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Exit code, output and errors of `qe-dist eval` with these words."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["qe-dist", "eval", *map(str, words), "--data", str(given_files["data"])])
        with pytest.raises(SystemExit) as end:
            main.main()
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    return run


@pytest.fixture
def refused(call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What is said about these words: one line, before any model is loaded."""

    def words(*given: object) -> str:
        def no_work(*_: object) -> None:
            raise AssertionError("it began to work")

        monkeypatch.setattr(evaluation.WholeModel, "states", no_work)
        code, _, said = call(*given)
        assert code == 2
        assert len(said.splitlines()) == 1
        return said

    return words


def changed(model: Path, folder: Path, **config: Any) -> Path:
    """A copy whose config.json says something else."""
    shutil.copytree(model, folder)
    before = json.loads((folder / "config.json").read_text())
    text = before["text_config"] | config
    (folder / "config.json").write_text(json.dumps(before | {"text_config": text}))
    return folder


def test_a_checkpoint_against_its_model_with_the_numbers_of_every_sample(
    call: Callable[..., tuple[int, str, str]], given_files: dict[str, Path]
) -> None:
    code, out, _ = call(given_files["rtn"], "--reference", given_files["model"], "--json")
    found = json.loads(out)
    assert code == 0
    assert found["kl"] > 0
    scores = found["scores"]
    assert len(scores["kl"]) == found["samples"] == 4
    assert sum(scores["kl"]) / sum(scores["tokens"]) == pytest.approx(found["kl"])
    assert found["intervals"]["kl"] is None


def test_too_few_samples_for_an_interval_are_said(
    call: Callable[..., tuple[int, str, str]], given_files: dict[str, Path]
) -> None:
    assert "too few samples for an interval: 4, where 10 are needed" in call(given_files["model"])[1]


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 600), ("hidden_size", 32), ("num_hidden_layers", 3)])
def test_a_reference_of_another_shape(
    refused: Callable[..., str], given_files: dict[str, Path], tmp_path: Path, name: str, value: int
) -> None:
    other = changed(given_files["model"], tmp_path / "other", **{name: value})
    assert f"has {name} " in refused(given_files["model"], "--reference", other)


def test_a_reference_with_another_chat_template(
    refused: Callable[..., str], given_files: dict[str, Path], tmp_path: Path
) -> None:
    other = changed(given_files["model"], tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text("Again. " + template.read_text())
    said = refused(given_files["model"], "--reference", other)
    assert "calibration.jsonl:1: " in said
    assert "must have the same tokenizer and chat template" in said


def test_tokenizer_files_that_say_the_same_in_other_words_are_no_fault(
    call: Callable[..., tuple[int, str, str]], given_files: dict[str, Path], tmp_path: Path
) -> None:
    other = changed(given_files["model"], tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    assert call(given_files["model"], "--reference", other)[0] == 0


def test_a_checkpoint_of_another_model(
    refused: Callable[..., str],
    given_files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tiny_model(tmp_path / "other", seed=7)
    capsys.readouterr()
    assert "was made from another model than" in refused(given_files["rtn"], "--reference", other)


def test_memory_that_is_not_there(
    refused: Callable[..., str], given_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        available = 2**30

    monkeypatch.setattr(psutil, "virtual_memory", Full)
    said = refused(given_files["model"])
    assert "takes a process of 1." in said
    assert "1.0 GiB are free" in said
    assert "--stream" in said


def test_stream_prints_what_the_whole_model_gives(
    call: Callable[..., tuple[int, str, str]], given_files: dict[str, Path]
) -> None:
    words = (given_files["rtn"], "--reference", given_files["model"], "--json")
    whole, blocks = (json.loads(call(*words, *more)[1]) for more in ((), ("--stream",)))
    for name in ("kl", "perplexity", "agreement"):
        assert whole[name] == pytest.approx(blocks[name], rel=1e-4)
