"""What is imported is declared in pyproject.toml, in the right extra, and nothing else is declared."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from qe_pipelines.console import EXTRA_OF, TO_QUANTIZE

import qe_dist
from tests.test_house import FILES, LIBRARY, ROOT, where

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PYPROJECT["optional-dependencies"]
OF_USERS = ("quantize", "report", "s3", "vllm", "serve")
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Where a package is not called as what it is imported by."""
NOT_IMPORTED = {"pyarrow": "Ray Serve LLM", "s3fs": "fsspec"}
"""Declared, and imported by whom instead of us."""


def declared(requirements: list[str]) -> set[str]:
    """Names of the distributions, in lower case; not qe_dist itself with other extras."""
    return {re.match(r"[\w-]+", line)[0].lower() for line in requirements} - {"qe_dist"}


def imported(path: Path, *, at_once: bool) -> Iterator[str]:
    """Distributions of others that a file imports. at_once: when it is imported itself, not when it is used."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in (name.partition(".")[0] for name in names):
            if name not in sys.stdlib_module_names and not name.startswith("qe_"):
                yield DISTRIBUTION.get(name, name)


BASE = declared(PYPROJECT["dependencies"])
OF_EXTRAS = {extra: declared(EXTRAS[extra]) for extra in OF_USERS}


def test_every_import_of_the_library_is_declared() -> None:
    known = BASE.union(*OF_EXTRAS.values())
    missing = [f"{where(p)} {name}" for p in FILES for name in imported(p, at_once=False) if name not in known]
    assert missing == []


def test_everything_declared_is_imported() -> None:
    used = {name for path in FILES for name in imported(path, at_once=False)} | set(NOT_IMPORTED)
    assert BASE.union(*OF_EXTRAS.values()) - used == set()


def test_only_what_vllm_and_offloading_bring_is_imported_at_once_beside_the_base() -> None:
    """Every other module of qe_dist and qe_kernels can be imported in a bare install."""
    beside = {
        (path.name, name)
        for path in FILES
        if path.is_relative_to(LIBRARY) or path.is_relative_to(ROOT / "kernels")
        for name in imported(path, at_once=True)
        if name not in BASE
    }
    assert beside == {
        ("offload.py", "accelerate"),
        ("vllm_gate.py", "fastapi"),
        ("vllm_gate.py", "starlette"),
        ("vllm_linear.py", "vllm"),
        ("vllm_media.py", "vllm"),
        ("vllm_names.py", "vllm"),
        ("vllm_options.py", "vllm"),
    }


def test_the_extra_that_is_named_brings_what_is_missing() -> None:
    for module, extra in EXTRA_OF.items():
        assert DISTRIBUTION.get(module, module) in OF_EXTRAS[extra]
    optional = {n for p in FILES for n in imported(p, at_once=False)} - BASE
    assert optional == {DISTRIBUTION.get(module, module) for module in EXTRA_OF}


def test_the_lock_holds_all_that_the_gate_and_its_users_need() -> None:
    """vLLM and Ray Serve have an environment of their own."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = {line.partition("==")[0].lower().replace("_", "-") for line in lock.splitlines() if "==" in line}
    needed = BASE.union(*(declared(EXTRAS[extra]) for extra in ("quantize", "report", "s3", "dev")))
    assert {name.replace("_", "-") for name in needed} - locked == set()


def test_the_version_is_in_one_place() -> None:
    assert PYPROJECT["dynamic"] == ["version"]
    assert f"qe-dist-serve:{qe_dist.__version__}\n" in (ROOT / "cluster/rayservice.yaml").read_text(encoding="utf-8")


HIDDEN = "import sys; sys.modules.update(dict.fromkeys({hidden!r})); sys.argv = {words!r}\n"
COMMAND = HIDDEN + "from qe_pipelines.console import main; main()"


def without(hidden: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[str]:
    """`qe-dist words` where these packages are not installed."""
    code = COMMAND.format(hidden=hidden, words=["qe-dist", *words])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


COMPARE = ("compare", "m", "--recipes", "rtn-w4a8", "--calibration", "c", "--data", "d", "--output", "o")
QUANTIZE = ("quantize", "m", "--recipe", "rtn-w4a8", "--calibration", "c", "--output", "o")


@pytest.mark.parametrize(
    ("hidden", "words", "extra"),
    [
        ("typer", ("--help",), "quantize"),
        ("ray", ("demo",), "quantize"),
        (TO_QUANTIZE[-1], QUANTIZE, "quantize"),
        ("matplotlib", COMPARE, "report"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(hidden: str, words: tuple[str, ...], extra: str) -> None:
    ended = without((hidden,), *words)
    assert ended.returncode == 2
    assert ended.stderr == f"error: {hidden} is not installed; pip install 'qe_dist[{extra}]'\n"


def test_help_does_not_wait_for_torch() -> None:
    ended = without(("torch", "ray", "transformers"), "--help")
    assert ended.returncode == 0, ended.stderr


def test_a_url_names_the_extra_that_it_lacks(tmp_path: Path) -> None:
    code = HIDDEN.format(hidden=("s3fs",), words=[]) + "from qe_dist.io.bucket import Bucket; Bucket('s3://models/m')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'qe_dist[s3]'" in ended.stderr.splitlines()[-1]


def test_a_bare_install_loads_and_generates(tmp_path: Path) -> None:
    """With none of the packages of an extra, in a process of its own."""
    from qe_dist.flow import local
    from qe_dist.flow.config import RunConfig
    from qe_dist.methods.recipes import load_recipe
    from tests.tiny import calibration, tiny_model

    samples, output = calibration(tmp_path / "data"), tmp_path / "out"
    local.quantize(RunConfig(tiny_model(tmp_path / "model"), load_recipe("qe-w4a6"), samples, output))
    code = (
        HIDDEN.format(hidden=(*EXTRA_OF, "scipy", "s3fs", "compressed_tensors"), words=["python", str(output)])
        + "import qe_dist, torch\n"
        "from transformers import AutoModelForImageTextToText as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1])\n"
        "found = model.generate(input_ids=torch.arange(7, 20)[None], max_new_tokens=4, min_new_tokens=4)\n"
        "print(tuple(found.shape))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "(1, 17)\n"
