"""Imports go one way: the linter reads what is written, a fresh interpreter shows what happens."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PURE = ("qe_dist.core", "qe_dist.numerics", "qe_dist.methods")
FOREIGN = ("ray", "triton", "transformers")

IMPORT_ALL = """
import importlib, json, pkgutil, sys

packages, foreign, blocked = json.loads(sys.argv[1])
if blocked:  # None makes an import fail just as if the package were not installed
    sys.modules.update(dict.fromkeys(foreign))
import torch

brought_by_torch = set(sys.modules)
modules = list(packages)
for name in packages:
    path = importlib.import_module(name).__path__
    modules += [module.name for module in pkgutil.walk_packages(path, f"{name}.")]
for name in modules:
    importlib.import_module(name)
present = [name for name in foreign if sys.modules.get(name) and name not in brought_by_torch]
print(json.dumps({"modules": modules, "present": present}))
"""


def import_all(*, blocked: bool) -> dict[str, list[str]]:
    """Import every pure module in a fresh interpreter: pytest's own has long imported others."""
    argument = json.dumps([PURE, FOREIGN, blocked])
    command = [sys.executable, "-I", "-c", IMPORT_ALL, argument]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_pure_modules_import_nothing_foreign() -> None:
    """A torch built for CUDA may import Triton by itself: what `import torch` alone brings is not
    held against us. Then this says nothing about Triton, but the next test and the linter do."""
    report = import_all(blocked=False)
    assert len(report["modules"]) > len(PURE)
    assert report["present"] == []


def test_pure_modules_work_where_nothing_foreign_is_installed() -> None:
    import_all(blocked=True)
