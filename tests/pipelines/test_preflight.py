"""The commands of docs/guides/serving.md, "Before serving: pre-flight", do what it says they do."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import calibration

pytestmark = [pytest.mark.ray, pytest.mark.nightly]

ROOT = Path(__file__).parents[2]


def shown() -> list[str]:
    """The indented lines of the section: commands, and what they print."""
    text = (ROOT / "docs" / "guides" / "serving.md").read_text(encoding="utf-8")
    section = text.partition("## Before serving: pre-flight\n")[2].partition("\n## ")[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


def test_the_commands_print_what_the_page_shows(tmp_path: Path) -> None:
    """A few samples instead of all: neither sizes nor padding depend on them."""
    placed = {"CHECKPOINT": str(tmp_path / "out"), "models/data/calibration.jsonl": str(calibration(tmp_path, 3))}
    commands = [line for line in shown() if line.startswith("qe-dist ")]
    printed = ""
    for command in commands:
        words = [placed.get(word, word) for word in shlex.split(command)]
        done = subprocess.run(
            [sys.executable, "-m", "qe_pipelines.main", *words[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    assert [command.split()[1] for command in commands] == ["quantize", "verify"]
    assert [line for line in shown() if line not in commands and line not in printed.splitlines()] == []
