"""A model several times larger than the memory that quantizes it, and what depth costs: nothing.

    python benchmarks/out_of_core.py            writes benchmarks/results/out_of_core.json (half an hour on 2 cores)
    python benchmarks/out_of_core.py --quick    a tiny demonstration of the same, writes nothing

Checkpoints of random weights (training/synthetic.py) go through the command `qe-dist quantize` with a local Ray, while
the memory of the driver, the workers, Ray's own processes and its object store is sampled (benchmarks/memory.py). First
models of 8 to 64 blocks of one width, then one that is many times larger than the peak. Beside each peak stands its
floor: what the command takes, once all is embedded, for a model so narrow that its weights are nothing, and
what the plan counts for the blocks that the workers hold (`methods/footprint.py`).
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import linear_regression
from typing import Any

from memory import DRIVER, MIB, RAY, STORE, Watched, watch
from qe_pipelines.progress import set_up_logging
from qe_pipelines.results import write_result
from rich.console import Console
from rich.table import Table

from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import prepare_run
from qe_dist.io.checkpoint import read_manifest
from qe_dist.methods.recipes import load_recipe

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "training"))
from synthetic import Shape, write_model  # noqa: E402 (scripts, no package)

DATA, RESULT = ROOT / "models" / "data", ROOT / "benchmarks" / "results" / "out_of_core.json"
Run = dict[str, Any]
POINTS = 200
"""Kept of a run's samples, each the highest of its neighbours."""


@dataclass(frozen=True)
class Setting:
    """What all runs have in common, and how large the models are."""

    shape: Shape
    depths: tuple[int, ...] = (8, 16, 32, 64)
    blocks: int = 440
    """Of the large model."""
    samples: int = 32
    recipe: str = "qe-w4a6"
    large_recipe: str = "rtn-w4a8"
    """Fits in a fraction of the time, so that hundreds of blocks take minutes."""
    workers: int = 2
    blocks_per_worker: int = 1
    samples_per_batch: int = 8
    sample_tokens: int = 1024

    @property
    def options(self) -> dict[str, Any]:
        """Of the command, and of `RunConfig`."""
        names = ("workers", "blocks_per_worker", "samples_per_batch", "sample_tokens")
        return {name: getattr(self, name) for name in names}


FULL = Setting(Shape(hidden=1024, intermediate=2816, heads=8, kv_heads=2))
NARROW = Shape(hidden=128, intermediate=256, heads=4, kv_heads=2)
"""Its weights and statistics are nothing: what a run of it takes is the floor of every run."""
QUICK = Setting(replace(NARROW, hidden=256, intermediate=512, heads=8), (2, 4), blocks=6, samples=8)


def calibration(folder: Path, count: int) -> Path:
    """Every n-th of the bundled samples, so that conversations and stories are both there."""
    lines = (DATA / "calibration.jsonl").read_text().splitlines()
    (folder / "calibration").symlink_to(DATA / "calibration")
    path = folder / "calibration.jsonl"
    path.write_text("\n".join(lines[i * len(lines) // count] for i in range(count)) + "\n")
    return path


def measure(work: Path, setting: Setting, shape: Shape) -> dict[str, Any]:
    """Writes the model, quantizes it to the end, and deletes both."""
    model, output, log = work / "model", work / "output", work / f"{shape.hidden}-{shape.blocks}.log"
    print(f"{shape.blocks} blocks of width {shape.hidden}: output in {log}", flush=True)
    write_model(model, shape)
    size = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    data = work / "calibration.jsonl"
    held = held_bytes(RunConfig(model, load_recipe(setting.recipe), data, output, **setting.options))
    given = {"recipe": setting.recipe, "calibration": data, "output": output} | setting.options
    options = [str(word) for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    watched = watch([sys.executable, "-m", "qe_pipelines.main", "quantize", str(model), *options], log)
    if watched.code or len(read_manifest(output).blocks) != shape.blocks:
        raise SystemExit(f"the command ended with {watched.code}: {log.read_text()[-2000:]}")
    shutil.rmtree(model)
    shutil.rmtree(output)
    return {
        "shape": asdict(shape),
        "recipe": setting.recipe,
        "checkpoint_mib": size / MIB,
        "held_mib": held / MIB,
        "seconds": watched.seconds,
        "peak_mib": watched.peak.total,
        "peak_without_embedder_mib": watched.peak_without("embedder").total,
        "at_peak_mib": watched.peak.mib,
        "peaks_mib": watched.peaks,
        "mib_over_seconds": thinned(watched),
    }


def held_bytes(run: RunConfig) -> int:
    """What the plan counts for the blocks of all workers."""
    task = prepare_run(run).task
    need = task.footprint(task.model.blocks[0])
    return (run.workers or 1) * ((run.blocks_per_worker or 1) * need.kept + need.passing)


def thinned(watched: Watched) -> list[tuple[float, float]]:
    """(seconds, MiB), at most POINTS of them, and the peak among them."""
    step = -(-len(watched.samples) // POINTS)
    parts = [watched.samples[i : i + step] for i in range(0, len(watched.samples), step)]
    highest = [max(part, key=lambda s: s.total) for part in parts]
    return [(round(s.seconds, 1), round(s.total, 1)) for s in highest]


def slope(runs: list[dict[str, Any]]) -> float:
    """MiB of peak memory for each further block, least squares."""
    return linear_regression([r["shape"]["blocks"] for r in runs], [r["peak_mib"] for r in runs]).slope


def table_of(runs: list[dict[str, Any]], floor: float) -> Table:
    """Peaks in MiB: of all together, and of each kind of process alone. floor: that of no weights."""
    kinds = [*sorted({kind for run in runs for kind in run["peaks_mib"]} - {DRIVER, RAY, STORE}), DRIVER, RAY, STORE]
    table = Table("blocks", "checkpoint", "peak", "floor", "checkpoint / peak", *kinds, "seconds")
    for run in runs:
        peak, size, of_kind = run["peak_mib"], run["checkpoint_mib"], run["peaks_mib"]
        cells = f"{size:.0f}", f"{peak:.0f}", f"{floor + run['held_mib']:.0f}", f"{size / peak:.2f}"
        peaks = [f"{of_kind.get(kind, 0):.0f}" for kind in kinds]
        table.add_row(str(run["shape"]["blocks"]), *cells, *peaks, f"{run['seconds']:.0f}")
    return table


def report(setting: Setting, narrow: Run, depth: list[Run], large: list[Run], quick: bool) -> None:
    peaks = [run["peak_mib"] for run in depth]
    spread = max(peaks) / min(peaks) - 1
    Console().print(table_of([narrow, *depth, *large], narrow["peak_without_embedder_mib"]))
    print(f"peaks over depth: spread {spread:.1%}, {slope(depth):+.2f} MiB for each block more", flush=True)
    if not quick:
        content = {"setting": asdict(setting), "narrow": narrow, "depth": depth, "large": large}
        write_result(RESULT, content | {"spread": spread, "mib_per_block": slope(depth)})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models; writes no result")
    parser.add_argument("--blocks", type=int, default=FULL.blocks, help="of the large model; 0: depth only")
    parser.add_argument("--large-only", action="store_true", help="with the depths of the last result")
    parser.add_argument("--work", type=Path, default=None, help="folder on a disk (no tmpfs) for models and outputs")
    given = parser.parse_args()
    set_up_logging(None)
    setting = QUICK if given.quick else replace(FULL, blocks=given.blocks)
    with tempfile.TemporaryDirectory(dir=given.work) as temporary:
        work = Path(temporary)
        calibration(work, setting.samples)
        if given.large_only:
            before = json.loads(RESULT.read_text())
            narrow, depth = before["narrow"], before["depth"]
        else:
            narrow = measure(work, setting, replace(NARROW, blocks=4 * setting.workers))
            depth = [measure(work, setting, replace(setting.shape, blocks=n)) for n in setting.depths]
            report(setting, narrow, depth, [], given.quick)  # the rest takes long, and may be interrupted
        if setting.blocks:
            cheap = replace(setting, recipe=setting.large_recipe)
            large = measure(work, cheap, replace(setting.shape, blocks=setting.blocks))
            report(setting, narrow, depth, [large], given.quick)


if __name__ == "__main__":
    sys.exit(main())
