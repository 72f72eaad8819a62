"""Three Ray nodes that are hosts of their own; one is cut off in the middle of a run and comes back.

    python benchmarks/hosts.py [--delay-ms 5] [--mbit 200] [--seed 0]    writes benchmarks/results/hosts.json

Needs Linux and root. The hosts are namespaces (network.py); they share this machine's disk, as hosts share a file
server. The cluster wants a token. One case is undisturbed. In the other a node goes off the network while batches
stream through it; Ray declares it dead; later it is on the network again, and its operator starts Ray on it once
more. Meanwhile the command is typed again whenever it fails. The checkpoint must have the bytes of one process.
"""

import argparse
import os
import random
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qe_pipelines.results import write_result
from rich.console import Console
from rich.table import Table

from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.methods.recipes import load_recipe

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.network import Host, megabits, network, round_trip_ms, why_not  # noqa: E402
from tests.tiny import calibration, tiny_model, with_blocks  # noqa: E402

HOSTS = ("head", "north", "south")
RECIPE = "qe-w4a6"
HEALTH = {"initial_delay_ms": 1000, "period_ms": 500, "timeout_ms": 1000, "failure_threshold": 3}
"""Of the head, so that it misses a node after 4 s. With Ray's own (5 s, 3 s, 10 s, 5) that takes a minute."""
CONTINUED = (os.EX_TEMPFAIL,)
"""Exit codes after which the command may be typed again."""
STORE_BYTES = 100 * 2**20
AWAY = 5.0
"""Seconds for which a host stays away after it was declared dead."""
PATIENCE = 300.0
"""Seconds within which everything happens, or has failed."""


@dataclass
class Call:
    """The command, typed once."""

    code: int
    seconds: float
    said: str


@dataclass
class Case:
    """A run of the command that wrote a checkpoint, and what happened meanwhile."""

    seconds: float
    calls: list[Call]
    traffic: dict[str, dict[str, int]]
    """Of each host: bytes sent and received while the case ran, Ray's own included."""
    equal: bool
    """Whether the checkpoint has the bytes of one process."""
    lost: str | None
    survivors: int
    """Workers of that host that were still at work when it came back, long after the head had given them up."""
    events: dict[str, float]
    """What was done to that host, and what came of it, in seconds from the begin of the case."""


class Cluster:
    """Ray on these hosts; the first is the head."""

    def __init__(self, hosts: Sequence[Host], folder: Path) -> None:
        self.hosts, self.folder, self.address = hosts, folder, f"{hosts[0].address}:6379"
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.env = dict(os.environ) | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # the same code everywhere
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        self.alive: set[str] = set()
        """Addresses of the nodes that are alive, as the head believes."""

    def start(self) -> None:
        for host in self.hosts:
            self.join(host)
        threading.Thread(target=self._watch, daemon=True).start()
        wait(lambda: all(map(self.is_alive, self.hosts)), "all nodes are alive")

    def join(self, host: Host) -> None:
        """What the operator of a host types."""
        if host is self.hosts[0]:
            role = ["--head", "--port=6379", "--include-dashboard=false"]
            env = self.env | {f"RAY_health_check_{key}": str(value) for key, value in HEALTH.items()}
        else:
            role, env = [f"--address={self.address}"], self.env
        own = [f"--node-ip-address={host.address}", f"--temp-dir={self.folder / host.name}"]
        size = ["--num-cpus=1", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats"]
        host.run(sys.executable, "-m", "ray.scripts.scripts", "start", *role, *own, *size, env=env)

    def is_alive(self, host: Host) -> bool:
        return host.address in self.alive

    def traffic(self) -> dict[str, dict[str, int]]:
        return {host.name: host.traffic() for host in self.hosts}

    def _watch(self) -> None:
        words = self.hosts[0].command(sys.executable, "-c", WATCH, self.address)
        with subprocess.Popen(words, env=self.env, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                self.alive = set(line.split())


WATCH = """
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
while True:
    print(*(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]), flush=True)
    time.sleep(0.1)
"""


def wait(happened: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE:.0f} s: {what}")
        time.sleep(0.02)


def type_until_done(cluster: Cluster, run: RunConfig) -> list[Call]:
    """Types the command, and again where it fails, as its last line asks for."""
    options = {
        "--recipe": RECIPE,
        "--calibration": run.calibration,
        "--output": run.output,
        "--workers": len(cluster.hosts),
        "--blocks-per-worker": 1,
        "--samples-per-batch": run.samples_per_batch,
        "--sample-tokens": run.sample_tokens,
        "--ray-address": cluster.address,
    }
    words = [sys.executable, "-m", "qe_pipelines.main", "quantize", str(run.model)]
    words = cluster.hosts[0].command(*words, *(str(word) for pair in options.items() for word in pair), "--quiet")
    calls: list[Call] = []
    begin = time.monotonic()
    while not calls or calls[-1].code:
        if time.monotonic() - begin > PATIENCE:
            raise TimeoutError(f"the command still fails after {len(calls)} calls: {calls[-1].said}")
        start = time.monotonic()
        done = subprocess.run(words, env=cluster.env, capture_output=True, text=True, timeout=PATIENCE)
        calls.append(Call(done.returncode, time.monotonic() - start, done.stderr.strip()))
        if done.returncode not in (0, *CONTINUED):
            raise RuntimeError(f"the command ended with {done.returncode}: {calls[-1].said}")
    return calls


Note = Callable[[str], None]
"""Writes down that something has happened now."""


def cut_off(cluster: Cluster, victim: Host, output: Path, batches: int, note: Note) -> int:
    """Takes a host off the network when so many batches have passed the first wave, and brings it back. Returns how
    many of its workers outlived their death in the books of the head until then."""
    wait(lambda: spooled(output) >= batches, f"{batches} batches have passed the first wave")
    victim.cut()
    note("cut off")
    wait(lambda: not cluster.is_alive(victim), f"{victim.name} is declared dead")
    note("declared dead")
    time.sleep(AWAY)
    survivors = victim.processes("^ray::Stage")
    victim.mend()
    note("on the network again")
    wait(lambda: not victim.processes("^raylet$|^ray::"), f"the old Ray of {victim.name} has ended")
    note("its old Ray has ended")
    cluster.join(victim)
    wait(lambda: cluster.is_alive(victim), f"{victim.name} is in the cluster again")
    note("in the cluster again")
    return survivors


def spooled(output: Path) -> int:
    """Batches that lie between two waves."""
    found = (output / ".run" / "activations").glob("block-*/batch-*.safetensors")
    return sum(batch.parent.name != "block-00000" for batch in found)


def measure(
    cluster: Cluster, run: RunConfig, expected: Mapping[str, bytes], lost: Host | None = None, batches: int = 0
) -> Case:
    """Quantizes on the cluster; `lost` is cut off when so many batches have passed the first wave."""
    before, start = cluster.traffic(), time.monotonic()
    events: dict[str, float] = {}

    def note(what: str) -> None:
        events[what] = time.monotonic() - start

    survivors = 0
    with ThreadPoolExecutor(1) as thread:
        typing = thread.submit(type_until_done, cluster, run)
        typing.add_done_callback(lambda _: note("checkpoint written"))
        if lost:
            survivors = cut_off(cluster, lost, run.output, batches, note)
        calls = typing.result()
    traffic = {
        name: {way: count - before[name][way] for way, count in ways.items()}
        for name, ways in cluster.traffic().items()
    }
    equal = files(run.output) == expected
    return Case(events["checkpoint written"], calls, traffic, equal, lost and lost.name, survivors, events)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def tiny_run(folder: Path, blocks: int, samples: int) -> RunConfig:
    """A model of random weights, and bundled samples."""
    model = tiny_model(folder / "model", config=with_blocks(blocks))
    data = calibration(folder / "data", samples)
    return RunConfig(model, load_recipe(RECIPE), data, folder / "local", samples_per_batch=2, sample_tokens=512)


def benchmark(folder: Path, delay_ms: float, mbit: float, seed: int, blocks: int, samples: int) -> dict[str, Any]:
    """Both cases on hosts of their own. More blocks than hosts, so that there is a second wave."""
    run = tiny_run(folder, blocks, samples)
    start = time.monotonic()
    local.quantize(run)
    seconds, expected = time.monotonic() - start, files(run.output)
    dice = random.Random(seed)
    with network(HOSTS, delay_ms, mbit) as hosts:
        wire = {
            "delay_ms": delay_ms,
            "mbit": mbit,
            "measured_round_trip_ms": round_trip_ms(hosts[0], hosts[1]),
            "measured_mbit": megabits(hosts[1], hosts[2]),
        }
        cluster = Cluster(hosts, folder)
        cluster.start()
        undisturbed = measure(cluster, replace(run, output=folder / "undisturbed"), expected)
        victim, batches = dice.choice(hosts[1:]), dice.randint(1, samples // run.samples_per_batch)
        cut = measure(cluster, replace(run, output=folder / "cut"), expected, victim, batches)
    return {
        "network": wire,
        "health_check": HEALTH,
        "seconds_of_one_process": seconds,
        "cases": {"undisturbed": asdict(undisturbed), f"cut off after {batches} batches": asdict(cut)},
    }


def report(result: Mapping[str, Any]) -> Table:
    table = Table("case", "seconds", "calls", "lost", "MiB sent", "same bytes")
    for name, case in result["cases"].items():
        sent = sum(ways["sent"] for ways in case["traffic"].values()) / 2**20
        cells = (f"{case['seconds']:.0f}", str(len(case["calls"])), case["lost"] or "", f"{sent:.1f}")
        table.add_row(name, *cells, "yes" if case["equal"] else "NO")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description="Three Ray nodes as hosts of their own; one is cut off for a while.")
    parser.add_argument("--delay-ms", type=float, default=5.0, help="of the network, in each direction")
    parser.add_argument("--mbit", type=float, default=200.0, help="that each host can send")
    parser.add_argument("--seed", type=int, default=0, help="which node is cut off, and when")
    args = parser.parse_args()
    if why := why_not():
        parser.error(why)
    with tempfile.TemporaryDirectory(prefix="qe-") as folder:
        result = benchmark(Path(folder), args.delay_ms, args.mbit, args.seed, blocks=6, samples=48)
    Console().print(report(result))
    write_result(ROOT / "benchmarks" / "results" / "hosts.json", result)
    return not all(case["equal"] for case in result["cases"].values())


if __name__ == "__main__":
    sys.exit(main())
