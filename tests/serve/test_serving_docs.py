"""What docs/guides/serving.md says of transformers is what a reader can type."""

import os
import re
from pathlib import Path

import pytest

from tests.serve.python import python

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "serving.md").read_text()
SECTION = PAGE.partition("## In transformers\n")[2].partition("\n## ")[0]
SCRIPTS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
FOUND = {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))}


@pytest.mark.parametrize(("script", "ranks"), list(zip(SCRIPTS, (1, 2), strict=True)), ids=["one", "two ranks"])
def test_the_scripts_run_as_they_stand(script: str, ranks: int, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "generate.py").write_text(script.replace("CHECKPOINT", str(checkpoints["rtn-w4a16g64"])))
    assert python("generate.py", ranks=ranks, cwd=tmp_path, env=FOUND).strip()
