"""Every recipe writes the bytes that were recorded (`python -m tests.recorded.checkpoints --write` after a change)."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recorded.checkpoints import ENVIRONMENT

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="recorded on x86-64, whose libraries sum in another order")
def test_every_recipe_writes_the_recorded_bytes():
    paths = os.pathsep.join(str(ROOT / root) for root in (".", "kernels", "cluster", "pipelines"))
    command = [sys.executable, "-m", "tests.recorded.checkpoints"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
