"""What docs/serving.md says of transformers is what a reader can type."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.torchrun import torchrun

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "serving.md").read_text().partition("## In transformers\n")[2].partition("\n## ")[0]
SCRIPTS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
FOUND = {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))}


def python(script: str, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, script], cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "by"), list(zip(SCRIPTS, (python, torchrun), strict=True)), ids=["one", "two ranks"]
)
def test_the_scripts_run_as_they_stand(
    script: str, by: Callable[..., str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "generate.py").write_text(script.replace("CHECKPOINT", str(checkpoints["rtn-w4a16g64"])))
    assert by("generate.py", cwd=tmp_path, env=FOUND).strip()
