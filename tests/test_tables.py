"""No number in the README is typed: its tables are what benchmarks/tables.py makes of the results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_are_what_the_results_say():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_table_has_its_result():
    for name in ("demo", "pipeline", "channels", "models"):
        assert (ROOT / "benchmarks" / "results" / f"{name}.json").exists()
