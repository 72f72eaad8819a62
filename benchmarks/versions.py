"""The tests that a package matters to, in every version of it that we say we work with.

    python benchmarks/versions.py [PACKAGE==VERSION ...]    writes benchmarks/results/versions.json

Each version gets an environment of its own under --venvs, which finds all else where this Python does. Versions that
are named are measured anew, the others stay as they are in the result. Packages without a wheel for CPUs, such as most
versions of torch, come with gigabytes of CUDA.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from qe_pipelines.results import write_result
from rich.console import Console

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "versions.json"
VERSIONS = {
    "transformers": ("5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0"),
    "torch": ("2.11.0", "2.14.1"),
    "ray": ("2.59.0", "2.60.0"),
}
TESTS = {
    "transformers": ("tests/serve", "tests/archs"),
    "torch": ("tests/core", "tests/numerics", "tests/methods", "tests/serve"),
    "ray": ("tests/cluster", "-m", "ray and not nightly"),
}
"""What pytest is given for each package, beside its own options."""
SOURCES = (".", "kernels", "cluster", "pipelines")


@dataclass
class Case:
    """How the tests of one version ended."""

    passed: int
    skipped: int
    failed: list[str]
    seconds: float


def environment(folder: Path, package: str) -> Path:
    """Its Python. The package and what it wants otherwise than we have it are installed, the rest is found.

    package: as pip names it, `ray==2.59.0`.
    """
    python = folder / package / "bin" / "python"
    if not python.exists():
        venv.create(folder / package, with_pip=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / package)}))
        (packages / "beside.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, package], check=True)
    return python


def run_tests(python: Path, tests: Sequence[str], report: Path) -> Case:
    """Runs these tests by that Python. report: where pytest writes its XML."""
    paths = os.pathsep.join(str(ROOT / source) for source in SOURCES)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    subprocess.run([python, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, check=False)
    return case_of(report)


def case_of(report: Path) -> Case:
    """What pytest's XML says."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    odd = [
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    failed, skipped = sorted({case.attrib["name"] for case in odd}), int(suite.attrib["skipped"])
    return Case(int(suite.attrib["tests"]) - skipped - len(failed), skipped, failed, float(suite.attrib["time"]))


def found_before() -> dict[str, Any]:
    return json.loads(RESULT.read_text())["cases"] if RESULT.exists() else {}


def _in_order(case: str) -> tuple[int, list[int]]:
    package, version = case.split("==")
    return list(VERSIONS).index(package), [int(part) for part in version.split(".")]


def main() -> None:
    every = [f"{package}=={version}" for package, versions in VERSIONS.items() for version in versions]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", default=every, metavar="PACKAGE==VERSION")
    parser.add_argument("--venvs", type=Path, default=ROOT / ".venv-versions", help="folder of the environments")
    asked = parser.parse_args()
    for package in asked.packages:
        python = environment(asked.venvs.resolve(), package)
        case = run_tests(python, TESTS[package.partition("==")[0]], asked.venvs.resolve() / f"{package}.xml")
        Console().print(f"{package}: {case.passed} passed, {len(case.failed)} failed {case.failed}")
        cases = found_before() | {package: asdict(case)}
        write_result(RESULT, {"cases": {name: cases[name] for name in sorted(cases, key=_in_order)}})
    sys.exit(any(case["failed"] for case in found_before().values()))


if __name__ == "__main__":
    main()
