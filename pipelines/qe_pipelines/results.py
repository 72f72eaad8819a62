"""Writes results with the environment in which they were measured: machine, versions, commit, command."""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "ray", "transformers", "safetensors", "scikit-learn", "numpy", "qe-dist")


def environment() -> dict[str, Any]:
    """Date, command, commit, machine and versions, as JSON can store them."""
    from qe_dist.core.machine import cpu_name  # with torch, which no other command waits for

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join([Path(sys.argv[0]).name, *map(_portable, sys.argv[1:])]),
        "commit": _commit(),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _portable(word: str) -> str:
    """An option without folders of this machine: a path in the project is relative to it, another one is its name."""
    option, equals, value = word.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return word
    root = Path(__file__).parents[2]
    return f"{option}{equals}{path.relative_to(root) if path.is_relative_to(root) else path.name}"


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file with the environment and then the content. A list of numbers is on one line, since there are
    many samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), **content}, indent=1)
    text = re.sub(r"\[\n\s*([^\[\]{}]*?)\n\s*\]", _on_one_line, text)
    path.write_text(text + "\n")


def _on_one_line(plain: re.Match[str]) -> str:
    return "[" + re.sub(r",\n\s*", ", ", plain[1]) + "]"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


WRITTEN = ("benchmarks/results", "*.md", "*.png")
"""Files that measuring writes. A change of these alone does not make a commit `-dirty`."""


def _commit() -> str | None:
    """The short commit, with `-dirty` when the code differs from it; None without git."""
    changed = ["git", "status", "--porcelain", "--untracked-files=no", "--", ":/"]
    try:
        commit = _said(["git", "rev-parse", "--short", "HEAD"])
        return commit + "-dirty" * bool(_said([*changed, *(f":(top,exclude){path}" for path in WRITTEN)]))
    except (OSError, subprocess.CalledProcessError):
        return None


def _said(command: list[str]) -> str:
    here = Path(__file__).parent
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
