"""Python on two ranks, by torchrun, on a busy machine.

On CPUs a rank may be ended by SIGABRT when all its work is done (PyTorch's issue 190489): a thread of gloo gives back
the last tensor and asks for the lock of an interpreter that is ending. Seen in one of some hundred runs, with six
processes on two cores. Such a run is made again.
"""

import os
import subprocess
import sys
from pathlib import Path

KILLED_BY_PYTHON = "terminate called without an active exception"


def torchrun(*words: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    """What `torchrun WORDS` printed. AssertionError with its messages where it failed."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    for _ in range(3):
        done = subprocess.run(
            run, cwd=cwd, env=os.environ | (env or {}) | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        if KILLED_BY_PYTHON not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout
