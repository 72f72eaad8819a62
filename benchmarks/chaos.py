"""Kills whatever takes part in a run, at random moments, and types the same command again where it ended.

    python benchmarks/chaos.py [--kills 60] [--seed 0]    writes benchmarks/results/chaos.json

Victims get SIGKILL: the command itself, a stage worker, the embed worker, a whole Ray node (its raylet and all workers
at once), everybody who writes while a file is half written, or the command twice in a row. The cluster is the one that
the command starts, or one of two or three Ray nodes on this machine. Who continues may have other workers. Every
checkpoint must have the bytes of one undisturbed process, and no block that was finished before a kill may be written
again.
"""

import argparse
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from qe_pipelines.results import write_result
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.io.journal import JOURNAL
from qe_dist.methods.recipes import load_recipe

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.hosts import HEALTH, PATIENCE, STORE_BYTES, files, wait  # noqa: E402
from tests.tiny import calibration, tiny_model, with_blocks  # noqa: E402

VICTIMS = ("node", "writer", "command twice", "command", "worker", "embedder")
RESULT = ROOT / "benchmarks" / "results" / "chaos.json"
BLOCKS, SAMPLES = 6, 24
STAGES, EMBEDDERS = ("ray::StageActor",), ("ray::Embed",)
"""What their processes are called."""
JOINING = 10.0
"""Seconds that a node takes to be in the cluster."""


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
class Outcome:
    trial: Trial
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


class Nodes:
    """Ray nodes on this machine, each of which can be killed; the first is the head."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder, self.address = folder, f"127.0.0.1:{_free_port()}"
        self.env = dict(os.environ) | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        self.processes = [self._start(head=i == 0) for i in range(count)]
        time.sleep(JOINING)

    def _start(self, head: bool) -> subprocess.Popen[bytes]:
        role = [f"--address={self.address}"]
        env = self.env
        if head:
            role = ["--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false"]
            role += [f"--ray-client-server-port={_free_port()}", f"--temp-dir={self.folder}"]
            env = env | {f"RAY_health_check_{key}": str(value) for key, value in HEALTH.items()}
        size = ["--num-cpus=1", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats", "--block"]
        size += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, *size]
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            process = subprocess.Popen(words, env=env, stdout=log, stderr=log)
        if head:
            wait(lambda: _listens(self.address) or process.poll() is not None, "the head listens")
        if process.poll() is not None:
            raise RuntimeError(f"ray start ended with {process.returncode}, see {log.name}")
        return process

    def mend(self) -> None:
        """Starts those anew that were killed."""
        dead = [p for p in self.processes if p.poll() is not None]
        self.processes = [self._start(head=False) if p in dead else p for p in self.processes]
        time.sleep(JOINING if dead else 0.0)

    def kill_one(self, dice: random.Random) -> None:
        kill(dice.choice(self.processes[1:]))

    def close(self) -> None:
        for process in reversed(self.processes):
            kill(process)


def kill(process: subprocess.Popen[Any]) -> None:
    """A process and all below it, at once, if it still is."""
    if process.poll() is not None:
        return
    for victim in (*_below(process.pid), psutil.Process(process.pid)):
        _kill(victim)
    process.wait()


def _below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []


def _kill(victim: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        victim.kill()


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
            "--worker-timeout": 20,
        }
        if self.nodes is not None:
            options["--ray-address"] = self.nodes.address
        words = [sys.executable, "-m", "qe_pipelines.main", "quantize", str(self.config.model), "--quiet"]
        env = (self.nodes.env if self.nodes else dict(os.environ)) | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path))
        }
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
            if time.monotonic() - start > PATIENCE or self.outcome.calls[-1] not in (-signal.SIGKILL, 2):
                said = Path(self.log.name).read_text()[-1000:]
                raise RuntimeError(f"the command ended with {self.outcome.calls}: {said}")
            self._end(self.type(self.trial.workers_after))
        output = self.config.output
        again = (name for name, when in self.finished.items() if (output / name).stat().st_mtime_ns != when)
        self.outcome.written_again = sorted(again)
        self.outcome.equal = files(output) == expected
        self.outcome.seconds = time.monotonic() - start

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        self.outcome.calls.append(process.wait(PATIENCE))
        self.log.close()

    def _reach(self, process: subprocess.Popen[bytes], moment: float) -> bool:
        """Waits for the moment; False where the command was done before it."""
        waves = -(-BLOCKS // (self.trial.workers * self.trial.blocks_per_worker))
        wanted = moment * (waves * SAMPLES + BLOCKS)
        before = self._progress()
        while process.poll() is None and (self._progress() - before < wanted or not self._victims(process)):
            time.sleep(0.005)
        time.sleep(self.trial.delay if self.trial.victim != "writer" else 0.0)
        while self.trial.victim == "writer" and process.poll() is None and not self._half_written():
            pass
        return process.poll() is None

    def _progress(self) -> int:
        journal = self.config.output / ".run" / JOURNAL
        content = journal.read_bytes() if journal.exists() else b""
        return content.count(b'"event": "batch"') + content.count(b'"event": "block"')

    def _half_written(self) -> bool:
        root = self.config.output / ".run"
        return any(True for name in ("blocks", "activations") for _ in (root / name).rglob(".*.tmp"))

    def _victims(self, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
        titles = {"worker": STAGES, "embedder": EMBEDDERS, "writer": (*STAGES, *EMBEDDERS)}.get(self.trial.victim)
        if titles is None:
            return [psutil.Process(process.pid)]
        roots = [process.pid, *(p.pid for p in self.nodes.processes)] if self.nodes else [process.pid]
        return [p for root in roots for p in _below(root) if _title(p).startswith(titles)]

    def _strike(self, process: subprocess.Popen[bytes], dice: random.Random) -> None:
        for report in (self.config.output / ".run" / "blocks").glob("block-*.json"):
            tensors = report.with_suffix(".safetensors")
            if tensors.exists():
                self.finished.setdefault(tensors.name, tensors.stat().st_mtime_ns)
        self.outcome.finished_before = len(self.finished)
        victims = self._victims(process)
        if self.trial.victim == "node":
            self.nodes.kill_one(dice)
        elif self.trial.victim in ("worker", "embedder") and victims:
            _kill(dice.choice(victims))
        else:
            for victim in (*victims, psutil.Process(process.pid)):
                _kill(victim)
        self.outcome.kills += 1


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _flat(options: Mapping[str, Any]) -> Iterator[Any]:
    for pair in options.items():
        yield from pair


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def clusters(folder: Path) -> Iterator[dict[int, Nodes]]:
    """By number of nodes, started when asked for."""

    class Lazy(dict[int, Nodes]):
        def __missing__(self, count: int) -> Nodes:
            self[count] = Nodes(count, folder / f"ray{count}")
            return self[count]

    with ExitStack() as stack:
        found = Lazy()
        stack.callback(lambda: [nodes.close() for nodes in found.values()])
        yield found


def benchmark(folder: Path, kills: int, seed: int) -> Iterator[Outcome]:
    """The outcome of every run, as it ends."""
    model = tiny_model(folder / "model", config=with_blocks(BLOCKS))
    data = calibration(folder / "data", SAMPLES)
    run = RunConfig(model, load_recipe("qe-w4a6"), data, folder / "undisturbed", samples_per_batch=1, sample_tokens=512)
    local.quantize(run)
    expected = files(run.output)
    dice = random.Random(seed)
    with clusters(folder) as found:
        for number in track(range(kills), description="kills"):
            trial = draw(dice, VICTIMS[number % len(VICTIMS)])
            nodes = None if trial.nodes == 1 else found[trial.nodes]
            if nodes is not None:
                nodes.mend()
            disturbed = Run(replace(run, output=folder / f"run-{number}"), trial, nodes)
            try:
                disturbed.go(dice, expected)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                disturbed.outcome.fault = str(error)
            yield disturbed.outcome


def report(outcomes: list[Outcome]) -> Table:
    table = Table("victim", "runs", "same bytes", "killed", "written again", "calls", "seconds")
    for victim in VICTIMS:
        mine = [o for o in outcomes if o.trial.victim == victim]
        if mine:
            calls = Counter(len(o.calls) for o in mine)
            table.add_row(
                victim,
                str(len(mine)),
                str(sum(o.equal for o in mine)),
                str(sum(o.kills for o in mine)),
                str(sum(len(o.written_again) for o in mine)),
                ", ".join(f"{n} x {count}" for count, n in sorted(calls.items())),
                f"{sum(o.seconds for o in mine) / len(mine):.0f}",
            )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills parts of runs at random moments, and continues them.")
    parser.add_argument("--kills", type=int, default=60, help="runs, of which each is disturbed")
    parser.add_argument("--seed", type=int, default=0, help="who is killed, when, on how many nodes")
    args = parser.parse_args()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="qe-", dir="/tmp") as folder:  # paths of sockets must be short
        for outcome in benchmark(Path(folder), args.kills, args.seed):
            outcomes.append(outcome)
            good = sum(outcome.good for outcome in outcomes)
            content = {"seed": args.seed, "kills": sum(o.kills for o in outcomes), "good": good}
            write_result(RESULT, content | {"runs": [asdict(o) for o in outcomes]})
    Console().print(report(outcomes))
    print(f"{good} of {len(outcomes)} runs were hit and have the bytes of an undisturbed one")
    return good != len(outcomes)


if __name__ == "__main__":
    sys.exit(main())
