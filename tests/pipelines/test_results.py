"""What a result says of how it was made."""

from pathlib import Path

import pytest
from qe_pipelines.results import environment

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (str(ROOT / "real" / "lm"), "real/lm"),
        ("/somewhere/else/model", "model"),
        (f"--output={ROOT}/runs/one", "--output=runs/one"),
        ("relative/path", "relative/path"),
        ("--first=64", "--first=64"),
    ],
)
def test_no_folder_of_this_machine_is_written(monkeypatch, given, written):
    monkeypatch.setattr("sys.argv", ["/usr/bin/tool.py", given])
    assert environment()["command"] == f"tool.py {written}"
