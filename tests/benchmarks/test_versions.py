"""What benchmarks/versions.py runs and counts."""

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.versions import TESTS, VERSIONS, case_of

ROOT = Path(__file__).parents[2]
SOME = """
import pytest

def test_right(): pass

@pytest.mark.skip
def test_left_out(): pass

@pytest.mark.parametrize("x", [1, 2])
def test_wrong(x): assert x == 1

def test_broken(nothing): pass
"""


def test_it_counts_what_pytest_found(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SOME)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, check=False)
    case = case_of(tmp_path / "report.xml")
    assert (case.passed, case.skipped, case.failed) == (2, 1, ["test_broken", "test_wrong[2]"])


def test_its_versions_are_those_that_pyproject_allows_from_the_oldest_one_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["quantize"]]
    allowed = {one.name: one.specifier for one in map(Requirement, lines)}
    for package, versions in VERSIONS.items():
        assert all(allowed[package].contains(version) for version in versions)
        (oldest,) = (spec.version for spec in allowed[package] if spec.operator == ">=")
        assert versions[0] in (oldest, f"{oldest}.0")


def test_what_it_runs_is_there() -> None:
    assert VERSIONS.keys() == TESTS.keys()
    assert all((ROOT / word).is_dir() for words in TESTS.values() for word in words if "/" in word)
