"""What benchmarks/transformers_versions.py counts."""

import subprocess
import sys
from pathlib import Path

from benchmarks.transformers_versions import case_of

TESTS = """
import pytest

def test_right(): pass

@pytest.mark.skip
def test_left_out(): pass

@pytest.mark.parametrize("x", [1, 2])
def test_wrong(x): assert x == 1

def test_broken(nothing): pass
"""


def test_it_counts_what_pytest_found(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, check=False)
    case = case_of(tmp_path / "report.xml")
    assert (case.passed, case.skipped, case.failed) == (2, 1, ["test_broken", "test_wrong[2]"])
