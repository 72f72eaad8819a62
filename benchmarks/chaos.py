"""Kills whatever takes part in a run, at random moments, and types the same command again where it ended.

    python benchmarks/chaos.py [--kills 60] [--seed 0] [--load 2] [--minutes 8]    writes benchmarks/results/chaos.json

Results of one clean commit add up: what earlier calls with the same seed and load have done is not done again. Each
run is told in a line: who was killed, when, how long it took until work went on, and whether the bytes are the same.

Victims get SIGKILL: the command itself, a stage worker, the embed worker, a whole Ray node (its raylet and all workers
at once), everybody who writes while a file is half written, or the command twice in a row. The cluster is the one that
the command starts, or one of two or three Ray nodes on this machine. Who continues may have other workers. Every
checkpoint must have the bytes of one undisturbed process, and no block that was finished before a kill may be written
again.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from qe_pipelines.results import environment, write_result

from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.io.journal import JOURNAL
from qe_dist.methods.recipes import load_recipe

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.hosts import files  # noqa: E402
from benchmarks.ray_nodes import Nodes, below, clusters, kill, kill_process  # noqa: E402
from tests.tiny import calibration, tiny_model, with_blocks  # noqa: E402

VICTIMS = ("node", "writer", "command twice", "command", "worker", "embedder")
RESULT = ROOT / "benchmarks" / "results" / "chaos.json"
BLOCKS, SAMPLES = 6, 24
STAGES, EMBEDDERS = ("ray::StageActor",), ("ray::Embed",)
"""What their processes are called."""
HANGS = 900.0
"""Seconds after which a command that has not ended counts as hanging."""
NOTICED, WENT_ON = re.compile(rb'"event": "(lost|again|start)"'), re.compile(rb'"event": "(batch|block|done)"')
CONTINUED = (-signal.SIGKILL, os.EX_TEMPFAIL)
"""Exit codes after which the same command is typed again."""


@dataclass(frozen=True)
class Trial:
    """What is killed, and when."""

    victim: str
    nodes: int
    workers: int
    workers_after: int
    """Of the command that continues."""
    blocks_per_worker: int
    moment: float
    """Share of the run's batches and blocks that are done when it happens."""
    delay: float
    """Seconds after that."""


@dataclass
class Kill:
    """Who was killed, when, and how long it took until work went on."""

    killed: list[str]
    second: float
    """Since the command was typed."""
    done: int
    """Batches and blocks that this command had done."""
    recovery: float | None = None
    """Seconds until the next batch or block after the loss was noticed; None where nobody missed the victim."""

    def __str__(self) -> str:
        took = "nobody missed it" if self.recovery is None else f"work went on after {self.recovery:.1f} s"
        return f"{', '.join(self.killed)} at {self.second:.1f} s after {self.done} batches and blocks; {took}"


@dataclass
class Outcome:
    trial: Trial
    load: int = 0
    """Other processes that compute all the time."""
    struck: list[Kill] = field(default_factory=list)
    kills: int = 0
    calls: list[int] = field(default_factory=list)
    """Exit codes of the command."""
    finished_before: int = 0
    """Blocks, at the last kill."""
    written_again: list[str] = field(default_factory=list)
    equal: bool = False
    fault: str = ""
    """Why the run never ended."""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.kills > 0 and self.equal and not self.written_again

    def __str__(self) -> str:
        where = f"{self.trial.nodes} nodes, {self.trial.workers} workers"
        told = "; then ".join(map(str, self.struck)) or "nobody was killed"
        end = self.fault or ("the same bytes" if self.equal else "OTHER BYTES")
        again = f", MADE AGAIN: {self.written_again}" if self.written_again else ""
        return f"{self.trial.victim} ({where}): {told}; exit codes {self.calls}, {end}{again}, {self.seconds:.0f} s"


def draw(dice: random.Random, victim: str) -> Trial:
    nodes = dice.choice((2, 3)) if victim == "node" else dice.choice((1, 1, 2, 3))
    moment = dice.uniform(0.0, 0.3) if victim == "embedder" else dice.uniform(0.0, 0.95)
    return Trial(
        victim,
        nodes,
        workers=dice.choice((1, 2)) if nodes == 1 else nodes,
        workers_after=dice.choice(range(1, max(2, nodes) + 1)),
        blocks_per_worker=dice.choice((1, 1, 2)),
        moment=moment,
        delay=dice.uniform(0.0, 0.3),
    )


class Run:
    """The command in one output directory, typed as often as needed."""

    def __init__(self, config: RunConfig, trial: Trial, nodes: Nodes | None) -> None:
        self.config, self.trial, self.nodes = config, trial, nodes
        self.outcome = Outcome(trial)
        self.finished: dict[str, int] = {}
        """Blocks that were finished before a kill, and when their tensors were written."""

    def type(self, workers: int) -> subprocess.Popen[bytes]:
        options = {
            "--recipe": "qe-w4a6",
            "--calibration": self.config.calibration,
            "--output": self.config.output,
            "--workers": workers,
            "--blocks-per-worker": self.trial.blocks_per_worker,
            "--samples-per-batch": self.config.samples_per_batch,
            "--sample-tokens": self.config.sample_tokens,
        }
        if self.nodes is not None:
            options["--ray-address"] = self.nodes.address
        words = [sys.executable, "-m", "qe_pipelines.main", "quantize", str(self.config.model), "--quiet"]
        env = (self.nodes.env if self.nodes else dict(os.environ)) | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path))
        }
        self.typed = time.monotonic()
        self.log = (self.config.output.parent / f"{self.config.output.name}.log").open("ab")
        return subprocess.Popen([*words, *map(str, _flat(options))], env=env, stdout=self.log, stderr=self.log)

    def go(self, dice: random.Random, expected: Mapping[str, bytes]) -> None:
        start = time.monotonic()
        for moment in (self.trial.moment, 0.0) if self.trial.victim == "command twice" else (self.trial.moment,):
            process = self.type(self.trial.workers if not self.outcome.kills else self.trial.workers_after)
            if self._reach(process, moment):
                self._strike(process, dice)
            self._end(process)
        while self.outcome.calls[-1] != 0:
            if time.monotonic() - start > HANGS or self.outcome.calls[-1] not in CONTINUED:
                said = Path(self.log.name).read_text()[-1000:]
                raise RuntimeError(f"the command ended with {self.outcome.calls}: {said}")
            self._end(self.type(self.trial.workers_after))
        output = self.config.output
        again = (name for name, when in self.finished.items() if (output / name).stat().st_mtime_ns != when)
        self.outcome.written_again = sorted(again)
        self.outcome.equal = files(output) == expected
        self.outcome.seconds = time.monotonic() - start

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Waits for the end of a call. Raises TimeoutExpired, and ends it, when it hangs."""
        while process.poll() is None:
            if time.monotonic() - self.typed > HANGS:
                kill(process)
                raise subprocess.TimeoutExpired(process.args, HANGS)
            self._watch_recovery()
            time.sleep(0.02)
        self._watch_recovery()
        self.outcome.calls.append(process.returncode)
        self.log.close()

    def _watch_recovery(self) -> None:
        """Notes when work went on after the last kill."""
        if not self.outcome.struck or self.outcome.struck[-1].recovery is not None:
            return
        since = self._journal()[self.journal_before :]
        noticed = NOTICED.search(since)
        if noticed and WENT_ON.search(since, noticed.end()):
            self.outcome.struck[-1].recovery = round(time.monotonic() - self.killed_at, 2)

    def _reach(self, process: subprocess.Popen[bytes], moment: float) -> bool:
        """Waits for the moment; False where the command was done before it."""
        waves = -(-BLOCKS // (self.trial.workers * self.trial.blocks_per_worker))
        wanted = moment * (waves * SAMPLES + BLOCKS)
        self.before = self._progress()
        while process.poll() is None and (self._progress() - self.before < wanted or not self._victims(process)):
            time.sleep(0.005)
        time.sleep(self.trial.delay if self.trial.victim != "writer" else 0.0)
        while self.trial.victim == "writer" and process.poll() is None and not self._half_written():
            pass
        return process.poll() is None

    def _journal(self) -> bytes:
        journal = self.config.output / ".run" / JOURNAL
        return journal.read_bytes() if journal.exists() else b""

    def _progress(self) -> int:
        content = self._journal()
        return content.count(b'"event": "batch"') + content.count(b'"event": "block"')

    def _half_written(self) -> bool:
        root = self.config.output / ".run"
        return any(True for name in ("blocks", "activations") for _ in (root / name).rglob(".*.tmp"))

    def _victims(self, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
        titles = {"worker": STAGES, "embedder": EMBEDDERS, "writer": (*STAGES, *EMBEDDERS)}.get(self.trial.victim)
        if titles is None:
            return [psutil.Process(process.pid)]
        roots = [process.pid, *(p.pid for p in self.nodes.processes)] if self.nodes else [process.pid]
        return [p for root in roots for p in below(root) if _title(p).startswith(titles)]

    def _strike(self, process: subprocess.Popen[bytes], dice: random.Random) -> None:
        for report in (self.config.output / ".run" / "blocks").glob("block-*.json"):
            tensors = report.with_suffix(".safetensors")
            if tensors.exists():
                self.finished.setdefault(tensors.name, tensors.stat().st_mtime_ns)
        self.outcome.finished_before = len(self.finished)
        victims = self._victims(process)
        struck = Kill([], round(time.monotonic() - self.typed, 2), self._progress() - self.before)
        self.journal_before, self.killed_at = len(self._journal()), time.monotonic()
        if self.trial.victim == "node":
            node = dice.choice(self.nodes.processes[1:])
            struck.killed = [f"node {self.nodes.processes.index(node)}", *map(_title, below(node.pid))]
            kill(node)
        elif self.trial.victim in ("worker", "embedder") and victims:
            victims = [dice.choice(victims)]
        else:
            victims = [*victims, psutil.Process(process.pid)]
        if self.trial.victim != "node":
            struck.killed = list(map(_title, victims))
            for victim in victims:
                kill_process(victim)
        struck.killed = [
            _short(title) for title in struck.killed if title.startswith(("node", "ray::")) or "qe_" in title
        ]
        self.outcome.struck.append(struck)
        self.outcome.kills += 1


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _short(title: str) -> str:
    """A process as the report names it."""
    return "command" if "qe_pipelines" in title else title.partition(" ")[0].partition("::")[2] or title


def _flat(options: Mapping[str, Any]) -> Iterator[Any]:
    for pair in options.items():
        yield from pair


def benchmark(folder: Path, kills: int, seed: int, load: int = 0, first: int = 0) -> Iterator[Outcome]:
    """The outcome of every run from number `first` on, as it ends, beside `load` busy processes."""
    model = tiny_model(folder / "model", config=with_blocks(BLOCKS))
    data = calibration(folder / "data", SAMPLES)
    run = RunConfig(model, load_recipe("qe-w4a6"), data, folder / "undisturbed", samples_per_batch=1, sample_tokens=512)
    local.quantize(run)
    expected = files(run.output)
    with clusters(folder) as found, busy(load):
        for number in range(first, kills):
            dice = random.Random(f"{seed} {number}")
            trial = draw(dice, VICTIMS[number % len(VICTIMS)])
            nodes = None if trial.nodes == 1 else found[trial.nodes]
            if nodes is not None:
                nodes.mend()
            disturbed = Run(replace(run, output=folder / f"run-{number}"), trial, nodes)
            disturbed.outcome.load = load
            try:
                disturbed.go(dice, expected)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                disturbed.outcome.fault = str(error)
            yield disturbed.outcome


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            kill(other)


def earlier(seed: int) -> list[dict[str, Any]]:
    """The runs that this commit has done with this seed, where it is a clean one."""
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": []}
    commit = environment()["commit"]
    same = commit and "dirty" not in commit and commit == found.get("environment", {}).get("commit")
    return found["runs"] if same and found["seed"] == seed else []


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills parts of runs at random moments, and continues them.")
    parser.add_argument("--kills", type=int, default=60, help="runs with this load, of which each is disturbed")
    parser.add_argument("--seed", type=int, default=0, help="who is killed, when, on how many nodes")
    parser.add_argument("--load", type=int, default=0, help="processes that compute all the time meanwhile")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    args = parser.parse_args()
    begin, runs = time.monotonic(), earlier(args.seed)
    first = sum(run["load"] == args.load for run in runs)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="qe-", dir="/tmp") as folder:  # paths of sockets must be short
        for outcome in benchmark(Path(folder), args.kills, args.seed, args.load, first):
            runs.append(asdict(outcome) | {"good": outcome.good})
            bad += not outcome.good
            print(f"{sum(run['load'] == args.load for run in runs)}: {outcome}", flush=True)
            good = sum(run["good"] for run in runs)
            content = {"seed": args.seed, "kills": sum(run["kills"] for run in runs), "good": good}
            write_result(RESULT, content | {"runs": runs})
            if time.monotonic() - begin > 60 * args.minutes:
                break
    counted = Counter((run["load"], run["good"]) for run in runs)
    for load in sorted({run["load"] for run in runs}):
        done = counted[load, True] + counted[load, False]
        print(f"load {load}: {counted[load, True]} of {done} runs were hit and have the bytes of an undisturbed one")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
