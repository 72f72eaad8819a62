"""What was run of every family of models: the tests that prove it, counted by family and column.

    python benchmarks/families.py [PART ...]    writes benchmarks/results/families.json

A part that is not named stays as it is in the result: `here`, in this environment; `names` and `served`, in one with
vLLM (`make test-vllm` sets it up in .venv-vllm). Only `served` starts engines.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from qe_pipelines.results import write_result

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "families.json"
SOURCES = (".", "kernels", "cluster", "pipelines")
IN_VLLM = ROOT / ".venv-vllm/bin/python"
Counts = dict[str, dict[str, list[int]]]
"""Family -> column -> how many tests passed, and how many ran."""


@dataclass(frozen=True)
class Part:
    python: Path
    words: tuple[str, ...]
    """For pytest."""
    columns: dict[str, str]
    """Column -> the tests that prove it; each has the name of a family first in brackets."""


PARTS = {
    "here": Part(
        Path(sys.executable), ("tests/archs/test_contract.py", "tests/archs/test_families.py"),
        {
            "streamed": r"test_promise|test_names_as_published",
            "quantized": r"test_block_by_block|test_a_checkpoint_of_8_bits",
            "verified": r"test_verify",
            "transformers": r"test_a_checkpoint_generates",
        },
    ),
    "names": Part(
        IN_VLLM, ("-m", "vllm", "tests/vllm/test_families.py", "-k", "maps"), {"vLLM names": r"test_vllm_maps"}
    ),
    "served": Part(
        IN_VLLM, ("-m", "vllm", "tests/vllm/test_families.py", "-k", "computes"),
        {"vLLM TP 1": r"test_vllm_computes\S*-1\]", "vLLM TP 2": r"test_vllm_computes\S*-2\]"},
    ),
}  # fmt: skip


def run_tests(part: Part, report: Path) -> None:
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *part.words]
    paths = os.pathsep.join(str(ROOT / source) for source in SOURCES)
    subprocess.run([part.python, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, check=False)


def cases_of(report: Path) -> Iterator[tuple[str, bool]]:
    """Name of every test that ran, and whether it passed."""
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is None:
            yield case.attrib["name"], case.find("failure") is None and case.find("error") is None


def counted(cases: Iterable[tuple[str, bool]], columns: dict[str, str]) -> Counts:
    passed, ran = Counter(), Counter()
    for name, fine in cases:
        family = re.search(r"\[([a-z0-9_]+)", name)
        for column, tests in columns.items():
            if family and re.match(tests, name):
                passed[family[1], column] += fine
                ran[family[1], column] += 1
    families = sorted({family for family, _ in ran})
    return {f: {c: [passed[f, c], ran[f, c]] for c in columns if ran[f, c]} for f in families}


def found_before() -> Counts:
    return json.loads(RESULT.read_text())["families"] if RESULT.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART")
    found = found_before()
    for part in (PARTS[name] for name in parser.parse_args().parts):
        with tempfile.TemporaryDirectory() as folder:
            run_tests(part, Path(folder) / "report.xml")
            now = counted(cases_of(Path(folder) / "report.xml"), part.columns)
        found = {name: found.get(name, {}) | now.get(name, {}) for name in sorted({*found, *now})}
    write_result(RESULT, {"families": found})
    sys.exit(any(passed < ran for columns in found.values() for passed, ran in columns.values()))


if __name__ == "__main__":
    main()
