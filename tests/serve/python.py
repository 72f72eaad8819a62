"""Python in a process of its own, or on several ranks by torchrun, on a busy machine.

On CPUs a rank may be ended by SIGABRT when all its work is done (PyTorch's issue 190489): a thread of gloo gives back
the last tensor and asks for the lock of an interpreter that is ending. Seen in one of some hundred runs, with six
processes on two cores. Such a run is made again.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

KILLED_BY_PYTHON = "terminate called without an active exception"


def python(*words: object, ranks: int, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """What `python WORDS` printed, one thread for each rank. AssertionError with its messages where it failed."""
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks] if ranks > 1 else []
    run = [sys.executable, *map(str, (*by, *words))]
    environment = os.environ | (env or {}) | {"OMP_NUM_THREADS": "1"}
    for _ in range(3):
        done = subprocess.run(run, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
        if ranks == 1 or KILLED_BY_PYTHON not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout
