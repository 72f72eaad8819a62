"""The tests of tests/serve in every version of transformers that we say we work with.

    python benchmarks/transformers_versions.py [VERSION ...]    writes benchmarks/results/transformers_versions.json

Each version gets an environment of its own under --venvs, which finds all else where this Python does. Versions that
are named are measured anew, the others stay as they are in the result.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from qe_pipelines.results import write_result
from rich.console import Console

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "transformers_versions.json"
VERSIONS = ("5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0")
SOURCES = (".", "kernels", "cluster", "pipelines")


@dataclass
class Case:
    passed: int
    skipped: int
    failed: list[str]
    seconds: float


def environment(folder: Path, version: str) -> Path:
    """Its Python. transformers and what it wants otherwise than we have it is installed, the rest is found."""
    python = folder / version / "bin" / "python"
    if not python.exists():
        venv.create(folder / version, with_pip=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / version)}))
        (packages / "beside.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, f"transformers=={version}"], check=True)
    return python


def run_tests(python: Path, report: Path) -> Case:
    paths = os.pathsep.join(str(ROOT / source) for source in SOURCES)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "tests/serve"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--venvs", type=Path, default=ROOT / ".venv-versions", help="folder of the environments")
    asked = parser.parse_args()
    for version in asked.versions:
        python = environment(asked.venvs.resolve(), version)
        case = run_tests(python, asked.venvs / f"{version}.xml")
        Console().print(f"transformers {version}: {case.passed} passed, {len(case.failed)} failed {case.failed}")
        cases = found_before() | {version: asdict(case)}
        ordered = dict(sorted(cases.items(), key=lambda item: [int(part) for part in item[0].split(".")]))
        write_result(RESULT, {"cases": ordered})
    sys.exit(any(case["failed"] for case in found_before().values()))


if __name__ == "__main__":
    main()
