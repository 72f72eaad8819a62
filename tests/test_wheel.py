"""The wheel holds the four packages whole, and nothing else, and works where it is installed."""

import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = {
    "qe_dist": ROOT,
    "qe_kernels": ROOT / "kernels",
    "qe_cluster": ROOT / "cluster",
    "qe_pipelines": ROOT / "pipelines",
}
OPTIONAL = ("triton", "vllm", "fastapi", "starlette")
"""What a module may ask for and not every machine has: Triton, and vLLM with the server that it brings."""

IMPORT_ALL = """
import importlib, json, sys

names, optional = json.loads(sys.argv[1])
files, without = {}, []
for name in names:
    try:
        files[name] = importlib.import_module(name).__file__
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in optional:
            raise
        without.append(name)
print("\\n" + json.dumps([files, without]))
"""


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def sources() -> set[str]:
    """Every file the wheel must hold: modules, and the data files that pyproject.toml names."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = ["*.py", *config["tool"]["setuptools"]["package-data"]["*"]]
    return {
        path.relative_to(root).as_posix()
        for package, root in SOURCE_ROOTS.items()
        for pattern in patterns
        for path in (root / package).rglob(pattern)
    }


def module_name(path: str) -> str:
    return ".".join(PurePosixPath(path.removesuffix("/__init__.py")).with_suffix("").parts)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a build folder behind, and puts what an earlier build
    left there into the next wheel."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    clutter = (".*", "build", "dist", "*.egg-info", "__pycache__", "*.png", "*.safetensors", "*.pt")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*clutter))
    out = source.with_name("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, cwd=source)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    assert names - metadata == sources()
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_every_module_imports_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (site,) = home.glob("lib/python*/site-packages")
    # The dependencies come from this environment. A folder named in a .pth file is searched, but
    # its own .pth files are not read: so the editable install in it stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")

    names = sorted(module_name(path) for path in sources() if path.endswith(".py"))
    argument = json.dumps([[n for n in names if not n.endswith("__main__")], OPTIONAL])
    output = run(python, "-I", "-c", IMPORT_ALL, argument, cwd=tmp_path)
    files, without = json.loads(output.splitlines()[-1])
    assert set(files) >= set(SOURCE_ROOTS)
    assert [file for file in files.values() if not Path(file).is_relative_to(site)] == []
    assert all(name.startswith(("qe_kernels.", "qe_dist.serve.", "qe_cluster.serve")) for name in without)
    assert (home / "bin/qe-dist").exists()
