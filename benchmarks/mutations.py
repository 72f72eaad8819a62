"""Would the gate see it? Ten faults put into numerics and engine, one at a time, and the test that fails for each.

    python benchmarks/mutations.py    writes benchmarks/results/mutations.json; some minutes

Works on a copy of the last commit. For each fault the tests of the file's own folder are run as the gate runs them, and
the first failure ends them; a fault that they let pass is tried on all tests without Ray.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from qe_pipelines.results import write_result

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutations.json"
GATE = "not (gpu or nightly or vllm or ray)"


@dataclass(frozen=True)
class Mutation:
    file: str
    before: str
    after: str
    tests: str
    """Where a failure is looked for first."""


MUTATIONS = (
    Mutation(
        "qe_dist/numerics/grid.py", "torch.div(x, scale).round_()", "torch.div(x, scale).floor_()", "tests/numerics"
    ),
    Mutation(
        "qe_dist/numerics/routing.py",
        "router.float().T).argmin(dim=1)",
        "router.float().T).argmax(dim=1)",
        "tests/numerics",
    ),
    Mutation(
        "qe_dist/numerics/routing.py", "    target = target - target.mean(dim=1, keepdim=True)\n", "", "tests/numerics"
    ),
    Mutation("qe_dist/numerics/allot.py", "key=lambda one: -one[0]", "key=lambda one: one[0]", "tests/methods"),
    Mutation(
        "qe_dist/methods/store.py", "columns = columns - up @ down", "columns = columns + up @ down", "tests/methods"
    ),
    Mutation("qe_dist/flow/stage.py", "is_next = batch.index == self.num_counted", "is_next = True", "tests/flow"),
    Mutation(
        "qe_dist/flow/local.py",
        "return following if following < len(",
        "return following if following <= len(",
        "tests/flow",
    ),
    Mutation(
        "qe_dist/flow/plan.py",
        "key=lambda i: ((shares[i] + 1) / speeds[i], i)",
        "key=lambda i: (shares[i] / speeds[i], i)",
        "tests/flow",
    ),
    Mutation(
        "qe_dist/io/run_dir.py",
        "return self._report_path(name).exists()",
        "return self.place(name).exists()",
        "tests/io",
    ),
    Mutation("qe_dist/io/publish.py", "        _sync(temporary)\n", "", "tests/io"),
)


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        subprocess.run(["git", "worktree", "add", "-q", "--detach", copy, "HEAD"], cwd=ROOT, check=True)
        try:
            for mutation in MUTATIONS:
                seen = failure(copy, mutation, mutation.tests) or failure(copy, mutation, "tests")
                print(
                    f"{mutation.file}: {mutation.after.strip() or 'a line left out'}: {seen or 'NOT SEEN'}", flush=True
                )
                rows.append(asdict(mutation) | {"seen_by": seen})
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", copy], cwd=ROOT, check=True)
    write_result(RESULT, {"mutations": rows})
    sys.exit(sum(row["seen_by"] is None for row in rows))


def failure(copy: Path, mutation: Mutation, tests: str) -> str | None:
    """The first test that fails with this fault; None where none does."""
    path = copy / mutation.file
    sound = path.read_text()
    if sound.count(mutation.before) != 1:
        raise SystemExit(f"{mutation.file} has {mutation.before!r} {sound.count(mutation.before)} times, expected once")
    path.write_text(sound.replace(mutation.before, mutation.after))
    roots = os.pathsep.join(str(copy / root) for root in (".", "kernels", "cluster", "pipelines"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", GATE, tests]
    try:
        done = subprocess.run(command, cwd=copy, env=os.environ | {"PYTHONPATH": roots}, capture_output=True, text=True)
    finally:
        path.write_text(sound)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].partition(" - ")[0] if failed else None


if __name__ == "__main__":
    main()
