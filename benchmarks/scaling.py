"""One worker against two at the same work, waves, llm-compressor in one process, and what the schedule's model says.

    make peer                                sets up .venv-peer, once
    python benchmarks/scaling.py             writes benchmarks/results/scaling.json; half an hour on two idle cores
    python benchmarks/scaling.py --quick     a tiny model, to see that all of it works: its numbers mean nothing

Every run is the real `qe-dist quantize` in a process of its own, every worker has one thread, and all checkpoints must
be the same bytes. Efficiency is T1 / (2 T2), of the whole command and from the first wave to the last block. The model
(`benchmarks/timeline.py`) is fed from the run with one worker, and from single steps timed here; it has seen neither
the run with two workers nor the one in waves. `benchmarks/schedule.py` prints what it says of larger machines.
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
from pipeline import matmul_rate
from qe_cluster.launch import ray_cluster
from qe_pipelines.progress import set_up_logging
from qe_pipelines.results import write_result
from quality.peers import encode_samples, measured
from rich.console import Console
from rich.table import Table
from timeline import Costs, Work, even_waves, predict

from qe_dist import archs
from qe_dist.core.determinism import pin
from qe_dist.data.samples import load_images, read_samples
from qe_dist.flow.config import RunConfig
from qe_dist.io.journal import JOURNAL, Record, read_journal
from qe_dist.io.publish import sha256
from qe_dist.io.run_dir import RunDir
from qe_dist.io.weights import SafetensorsSource
from qe_dist.methods.recipes import load_recipe

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "training"))
from synthetic import Shape, write_model  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
CALIBRATION = ROOT / "models" / "data" / "calibration.jsonl"
RECIPE, PEER_RECIPE = "gptq-w4a16", "gptq-w4a16"
SAMPLES_PER_BATCH = 4
FULL = Shape(hidden=1024, intermediate=4096, blocks=8, heads=16, kv_heads=4)
QUICK = Shape(hidden=128, intermediate=256, blocks=6, heads=4, kv_heads=2)


@dataclass(frozen=True)
class Case:
    workers: int
    blocks_per_worker: int | None = None

    def work(self, blocks: int, batches: int) -> Work:
        waves = even_waves(blocks, self.workers, self.blocks_per_worker)
        return Work(waves, batches, self.workers, cores=os.cpu_count() or 1)


CASES = {"1 worker": Case(1), "2 workers": Case(2), "2 workers, one block at a time": Case(2, 1)}


@dataclass(frozen=True)
class Times:
    """Seconds of one `qe-dist quantize`, out of its journal."""

    command: float
    """From typing it to its end."""
    around: float
    """Before the first wave is planned and after the last block: imports, headers, Ray's start and end, assembling."""
    first_batch: float
    """From the plan until the first batch has passed: loading, the vision tower, imports of workers."""
    batch: float
    """Between two batches of the first wave, on average."""
    fit: float
    """From the last batch to the last block, summed over waves."""

    @property
    def work(self) -> float:
        """Seconds from the first wave to the last block."""
        return self.command - self.around


def times_of(records: Sequence[Record], command: float) -> Times:
    """records: the journal of a run; command: seconds of the whole command."""
    waves = [i for i, record in enumerate(records) if record.event == "wave"]
    parts = [records[a:b] for a, b in pairwise([*waves, len(records)])]
    batches = [[r.elapsed for r in part if r.event == "batch"] for part in parts]
    blocks = [[r.elapsed for r in part if r.event == "block"] for part in parts]
    first, last = records[waves[0]].elapsed, blocks[-1][-1]
    return Times(
        command=command,
        around=command - (last - first),
        first_batch=batches[0][0] - first,
        batch=(batches[0][-1] - batches[0][0]) / (len(batches[0]) - 1),
        fit=sum(done[-1] - streamed[-1] for streamed, done in zip(batches, blocks, strict=True)),
    )


class Bench:
    def __init__(self, shape: Shape, work: Path, peer: Path) -> None:
        self.work, self.peer, self.model = work, peer, work / "model"
        write_model(self.model, shape)
        self.blocks = shape.blocks
        run = RunConfig(
            self.model, load_recipe(RECIPE), CALIBRATION, work / "steps", samples_per_batch=SAMPLES_PER_BATCH
        )
        samples = read_samples(CALIBRATION)
        self.run, self.samples = (
            run,
            [samples[i : i + SAMPLES_PER_BATCH] for i in range(0, len(samples), SAMPLES_PER_BATCH)],
        )

    def ours(self, case: Case) -> tuple[Times, dict[str, str]]:
        """Its times, and the hash of every file of weights."""
        output = self.work / "ours"
        shutil.rmtree(output, ignore_errors=True)
        options: dict[str, Any] = {
            "--recipe": RECIPE,
            "--calibration": CALIBRATION,
            "--output": output,
            "--workers": case.workers,
            "--samples-per-batch": SAMPLES_PER_BATCH,
        }
        if case.blocks_per_worker:
            options["--blocks-per-worker"] = case.blocks_per_worker
        words = [str(word) for pair in options.items() for word in pair]
        command = [sys.executable, "-m", "qe_pipelines.main", "quantize", str(self.model), "--quiet", *words]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        records, _ = read_journal(RunDir(output).root / JOURNAL)
        return times_of(records, seconds), {p.name: sha256(p) for p in sorted(output.glob("*.safetensors"))}

    def peers(self, threads: int) -> dict[str, Any]:
        samples, output = self.work / "calibration.safetensors", self.work / "peer"
        if not samples.exists():
            encode_samples(self.model, CALIBRATION, samples)
        shutil.rmtree(output, ignore_errors=True)
        script = ROOT / "benchmarks" / "quality" / "peer.py"
        options = ["--recipe", PEER_RECIPE, "--calibration", samples, "--threads", str(threads)]
        return measured([self.peer / "bin" / "python", script, self.model, output, *options], threads, ours=False)

    def costs(self, one: Times) -> Costs:
        """one: of the run with one worker, all blocks in one wave."""
        steps = self.steps()
        forward = one.batch / self.blocks
        startup = one.around + one.first_batch - one.batch - self.blocks * steps["load"] - steps["embed"]
        return Costs(startup=startup, forward=forward, fit=(one.fit / self.blocks,), **steps)

    @torch.no_grad()
    def steps(self) -> dict[str, float]:
        """Seconds of steps that a run does not show one by one."""
        pin(1)
        source = SafetensorsSource(self.model)
        arch = archs.for_config(source.config)
        block = arch.spec(source).blocks[0]
        encoder, prelude = arch.encoder(self.model), arch.prelude(source, "cpu", self.run.dtype)
        store, middle = RunDir(self.run.output), len(self.samples) // 2

        def embed():
            return prelude([encoder(sample, load_images(sample)) for sample in self.samples[middle]], middle)

        batch = embed()
        return {
            "load": seconds_of(lambda: arch.block(source, block, "cpu", self.run.dtype)),
            "embed": seconds_of(embed),
            "spool_write": seconds_of(lambda: store.put_batch(1, batch)),
            "spool_read": seconds_of(lambda: store.get_batch(1, middle)),
        }


def seconds_of(step: Callable[[], object], repeats: int = 5) -> float:
    """Median, after one to warm up."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return median(found[1:])


def independent_processes() -> float:
    """Efficiency of two processes that share nothing but the machine: no schedule can reach more."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(matmul_rate, [256, 256]))  # imports
        alone = pool.submit(matmul_rate, 1024, 40).result()
        return sum(pool.map(matmul_rate, [1024, 1024], [40, 40])) / (2 * alone)


def overheads() -> dict[str, float]:
    """Seconds that every run pays, whatever its work; one after the other here, partly at once there."""
    clock = [time.perf_counter()]
    subprocess.run([sys.executable, "-c", "import qe_pipelines.main, qe_cluster.driver"], check=True)
    clock.append(time.perf_counter())
    with ray_cluster(None, 1):
        clock.append(time.perf_counter())
        ray.get(ray.remote(importlib.import_module).remote("qe_cluster.actors"))
        clock.append(time.perf_counter())
    clock.append(time.perf_counter())
    names = ("imports of the command", "start of Ray", "start of a worker", "end of Ray")
    return {name: end - start for name, (start, end) in zip(names, pairwise(clock), strict=True)}


def medians(found: list[Times]) -> Times:
    return Times(**{name: median(getattr(times, name) for times in found) for name in asdict(found[0])})


def efficiency(one: Times, two: Times) -> dict[str, float]:
    return {"command": one.command / (2 * two.command), "after start-up": one.work / (2 * two.work)}


def table_of(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table("run", "command s", "around", "first batch", "a batch", "fits", "predicted", "error")
    for name, row in rows.items():
        times = [f"{seconds:.2f}" for seconds in row["seconds"].values()]
        table.add_row(name, *times, f"{row['predicted']['seconds']:.1f}", f"{row['error']:+.1%}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model; writes no result")
    parser.add_argument("--blocks", type=int, default=FULL.blocks, help="of the model")
    parser.add_argument("--repeats", type=int, default=3, help="of everything, in turn; medians are reported")
    parser.add_argument(
        "--peer", type=Path, default=ROOT / ".venv-peer", help="virtual environment with llm-compressor"
    )
    asked = parser.parse_args()
    if not (asked.peer / "bin" / "python").exists():
        parser.error(f"--peer {asked.peer} is no virtual environment; `make peer` sets it up")
    set_up_logging(None)
    shape = QUICK if asked.quick else replace(FULL, blocks=asked.blocks)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(shape, Path(temporary), asked.peer)
        times: dict[str, list[Times]] = {name: [] for name in CASES}
        peers: dict[str, list[dict[str, Any]]] = {"1 thread": [], "2 threads": []}
        hashes = []
        for _ in range(1 if asked.quick else asked.repeats):
            for name, case in CASES.items():
                found, files = bench.ours(case)
                times[name].append(found)
                hashes.append(files)
            for threads, name in enumerate(peers, 1):
                peers[name].append(bench.peers(threads))
        if any(files != hashes[0] for files in hashes):
            sys.exit("the checkpoints differ: this is no comparison of the same work")
        costs, blocks, batches = bench.costs(medians(times["1 worker"])), bench.blocks, len(bench.samples)
    rows = {}
    for name, case in CASES.items():
        seconds, predicted = medians(times[name]), predict(costs, case.work(blocks, batches))
        error = predicted.seconds / seconds.command - 1
        rows[name] = {"seconds": asdict(seconds), "predicted": asdict(predicted), "error": error}
    commands = {name: median(run["process_seconds"] for run in found) for name, found in peers.items()}
    result = {
        "shape": asdict(shape),
        "recipe": RECIPE,
        "batches": batches,
        "runs": rows,
        "all_seconds": {name: [asdict(each) for each in found] for name, found in times.items()},
        "costs": asdict(costs),
        "overheads": overheads(),
        "efficiency": efficiency(*(medians(times[name]) for name in ("1 worker", "2 workers"))),
        "efficiency_of_independent_processes": independent_processes(),
        "peer": {"recipe": PEER_RECIPE, "command_seconds": commands, "runs": peers},
    }
    report(result)
    if not asked.quick:
        write_result(RESULTS / "scaling.json", result)


def report(result: dict[str, Any]) -> None:
    Console(width=None if sys.stdout.isatty() else 140).print(table_of(result["runs"]))
    for name, seconds in result["overheads"].items():
        print(f"{name}: {seconds:.1f} s")
    for name, value in result["efficiency"].items():
        print(f"efficiency of two workers, {name}: {value:.2f}")
    print(f"two processes that share nothing: {result['efficiency_of_independent_processes']:.2f}")
    for name, seconds in result["peer"]["command_seconds"].items():
        print(f"llm-compressor, {result['peer']['recipe']}, {name}: {seconds:.1f} s")


if __name__ == "__main__":
    main()
