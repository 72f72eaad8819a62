"""What docs/serving.md says of transformers is what a reader can type."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "serving.md").read_text().partition("## In transformers\n")[2].partition("\n## ")[0]
SCRIPTS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize(("script", "by"), list(zip(SCRIPTS, ((), TORCHRUN), strict=True)), ids=["one", "two ranks"])
def test_the_scripts_run_as_they_stand(
    script: str, by: tuple[str, ...], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "generate.py").write_text(script.replace("CHECKPOINT", str(checkpoints["rtn-w4a16g64"])))
    found = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))}
    run = [sys.executable, *by, "generate.py"]
    done = subprocess.run(run, cwd=tmp_path, env=found | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
