"""The scripts of examples/ do what their docstrings say, and are short."""

import ast
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from qe_dist.core.errors import ConfigError
from qe_dist.serve.http.endpoint import Endpoint
from tests.tiny import MODELS, calibration

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
LONGEST = 40


def main_of(name: str) -> Callable[..., int | None]:
    return runpy.run_path(str(FOLDER / name))["main"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_it_is_run(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(text))


def test_quantize_writes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_of("quantize.py")(str(tmp_path / "out"), str(MODELS / "plain"), str(calibration(tmp_path, 3)))
    assert (tmp_path / "out" / "config.json").exists()
    assert "product in int8" in capsys.readouterr().out


def test_a_recipe_of_ones_own_stands_beside_gptq(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_of("recipe.py")(str(tmp_path / "out"), str(MODELS / "plain"), str(calibration(tmp_path, 3)))
    mine, gptq = capsys.readouterr().out.splitlines()
    bits = [float(line.split()[1]) for line in (mine, gptq)]
    assert bits[0] == pytest.approx(bits[1] + 0.5, abs=0.1)


def test_the_command_that_serves_is_that_of_the_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    main_of("serve.py")("/some/checkpoint", "2")
    *variables, command = capsys.readouterr().out.splitlines()
    assert {line.removeprefix("export ").partition("=")[0] for line in variables} == Endpoint("x").environment().keys()
    assert command.startswith("vllm serve /some/checkpoint")
    assert "--tensor-parallel-size=2" in command


def test_submit_needs_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a job runs on one, tests/cluster/test_submit.py shows."""
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="no Ray cluster takes jobs"):
        main_of("submit.py")("http://127.0.0.1:1", "compare", "--list")
