"""What `pip install` of the wheel alone brings, how large it is, and whether a checkpoint loads and generates with it.

    python benchmarks/install.py        writes benchmarks/results/install.json

The bundled models/plain is quantized here by examples/quantize.py. An empty environment then gets torch, in the version
of requirements.lock, and the wheel without any extra; in it the checkpoint generates, and so it does here.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qe_pipelines.results import write_result

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "install.json"
MODEL = ROOT / "models" / "plain"
GENERATE = """
import importlib.util, json, sys, time

start = time.perf_counter()
import qe_dist  # from now on, transformers knows the checkpoint
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32)
asked = tokenizer("The red", return_tensors="pt")
made = model.generate(**asked, max_new_tokens=8, do_sample=False)[0].tolist()
found = [name for name in ("ray", "accelerate", "sklearn", "typer") if importlib.util.find_spec(name)]
print(json.dumps({"tokens": made, "found": found, "seconds": time.perf_counter() - start}))
"""


@dataclass(frozen=True)
class Step:
    """One call of pip: what it is asked for, how long it takes, and the packages and MiB that it adds."""

    installed: str
    seconds: float
    packages: int
    mib: float


def run(*command: str | Path, cwd: Path) -> str:
    """What a command says. CalledProcessError where it fails; its errors are on the terminal."""
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True).stdout


def build_wheel(folder: Path) -> Path:
    """Builds the wheel from a copy, since setuptools leaves a folder behind that would go into the next wheel."""
    source = folder / "source"
    clutter = (".*", "real", "build", "dist", "*.egg-info", "__pycache__", "*.png", "*.safetensors")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*clutter))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def torch_version() -> str:
    """`torch==VERSION` of requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


class Environment:
    """An empty environment, and what was installed in it since."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.folder, self.python = folder, folder / "bin" / "python"
        (self.packages,) = folder.glob("lib/python*/site-packages")

    def install(self, asked: str | Path) -> Step:
        """Installs by this Python's pip, so that pip itself is not counted."""
        before, start = self._size(), time.perf_counter()
        pip = (
            sys.executable,
            "-m",
            "pip",
            "--python",
            self.python,
            "install",
            "--quiet",
            "--disable-pip-version-check",
        )
        run(*pip, "install", "--quiet", asked, cwd=self.folder)
        seconds, after = time.perf_counter() - start, self._size()
        return Step(Path(asked).name, seconds, after[0] - before[0], (after[1] - before[1]) / 2**20)

    def _size(self) -> tuple[int, int]:
        """(number of packages, bytes of their files as installed)"""
        files = (path for path in self.packages.rglob("*") if path.is_file() and not path.is_symlink())
        return len(list(self.packages.glob("*.dist-info"))), sum(path.stat().st_size for path in files)


def measure(folder: Path) -> dict[str, Any]:
    """The steps of the install, and what the checkpoint generates there and here."""
    wheel, checkpoint = build_wheel(folder), folder / "checkpoint"
    run(sys.executable, ROOT / "examples" / "quantize.py", checkpoint, cwd=folder)
    bare = Environment(folder / "venv")
    steps = [bare.install(torch_version()), bare.install(wheel)]
    there = json.loads(run(bare.python, "-I", "-c", GENERATE, checkpoint, cwd=folder).splitlines()[-1])
    here = json.loads(run(sys.executable, "-c", GENERATE, checkpoint, cwd=folder).splitlines()[-1])
    return {
        "steps": [asdict(step) for step in steps],
        "not_installed": sorted({*here["found"]} - {*there["found"]}),
        "generate_seconds": there["seconds"],
        "same_tokens": there["tokens"] == here["tokens"],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    write_result(RESULT, found)
    print(json.dumps(found, indent=1))
    sys.exit(not found["same_tokens"] or "ray" not in found["not_installed"])


if __name__ == "__main__":
    main()
