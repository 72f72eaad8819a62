"""What the schedule's model says of 1, 8, 64 and 512 H100: predictions, nothing of it was measured at that size.

    python benchmarks/schedule.py     writes benchmarks/results/schedule.json

A block's seconds are its work (gpu/work.py) over the rates of an H100. Once gpu/block.py has been run on one, and left
benchmarks/results/block_cuda.json, streaming and fitting take as much longer than that as they did there. The schedule
is `benchmarks/timeline.py`, which benchmarks/scaling.py holds against real runs. Of several sizes of a batch the best
is taken: short ones fill a long pipeline sooner, long ones update the Gram matrices less often.
"""

import json
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gpu.work import Load, Rates, Shape, work
from qe_cluster.balance import fit_cost
from qe_pipelines.results import write_result
from rich.console import Console
from rich.table import Table
from timeline import Costs, Timeline, Work, even_waves, predict

from qe_dist.methods.footprint import footprint
from qe_dist.methods.recipes import load_recipe

RESULTS = Path(__file__).parent / "results"
RECIPE = "qe-w4a6"
GPUS = (1, 8, 64, 512)
MODELS = {"72B": (Shape(), 80), "405B": (Shape(hidden=16384, intermediate=53248, heads=128), 126)}
"""Shapes of a block, and how many there are: those of Qwen2-VL-72B and, for a Qwen2-VL of that size, Llama 3.1 405B."""
BATCHES = (1024, 2048, 4096, 8192)
"""Tokens of a batch that are tried."""
STREAMED = ("forward", "gram", "channels", "sample", "move")
"""Parts of gpu/block.py that every batch passes; all others but `load` are the fit."""


@dataclass(frozen=True)
class Machine:
    """Nodes of eight H100 SXM. Per second, and bytes, from the data sheets of the H100 and the DGX H100; what they do
    not say is assumed, and says so."""

    gpus_per_node: int = 8
    memory: float = 80e9
    bus: float = 64e9
    """PCIe 5.0 x16, one way."""
    network: float = 50e9
    """One 400 Gb/s port for each GPU."""
    object_store: float = 1e9
    """Assumed: serialize, copy twice, read."""
    storage: float = 10e9
    """Assumed, of each node: its NVMe disks, or its part of a parallel file system."""
    startup: float = 20.0
    """Assumed: imports, CUDA contexts, actors on all nodes, assembling at the end."""
    vision: float = 0.675e9
    """Weights of the vision tower of all Qwen2-VL models."""


@dataclass(frozen=True)
class Slower:
    """Than work over rates, as factors."""

    stream: float = 1.0
    fit: float = 1.0
    source: str = "work over rates: no block was measured"


def slower() -> Slower:
    path = RESULTS / "block_cuda.json"
    if not path.exists():
        return Slower()
    result = json.loads(path.read_text())
    sums = {"stream": [0.0, 0.0], "fit": [0.0, 0.0]}
    for name, part in result["parts"].items():
        if name != "load":
            kind = sums["stream" if name in STREAMED else "fit"]
            kind[0] += part["seconds"]
            kind[1] += part["predicted"] or 0.0
    factors = {kind: seconds / predicted for kind, (seconds, predicted) in sums.items()}
    return Slower(**factors, source=f"a block measured on {result['device']}")


def costs(shape: Shape, batch: int, link: float, factors: Slower, machine: Machine) -> Costs:
    """link: bytes per second at which activations travel."""
    block, load, rates = shape.block(), Load(batch=batch), Rates()
    seconds = {name: rates.seconds(name, part) for name, part in work(block, load_recipe(RECIPE), load).items()}
    stream = sum(s for name, s in seconds.items() if name in STREAMED)
    fit = factors.fit * sum(s for name, s in seconds.items() if name not in (*STREAMED, "load"))
    shares = [fit_cost(group) for group in block.groups]
    weights, hidden = 2 * block.num_weights, 2 * batch * shape.hidden
    patches = 4 * batch / 2  # of an image, if half of the tokens come from images
    return Costs(
        startup=machine.startup,
        read=weights / machine.storage,
        load=weights / machine.bus,
        forward=factors.stream * stream * batch / load.tokens,
        fit=tuple(fit * share / sum(shares) for share in shares),
        embed=2 * machine.vision * patches / rates.flop,
        transfer=hidden / link,
        spool_write=hidden / machine.storage,
        spool_read=hidden / machine.storage,
    )


@cache
def room(shape: Shape, batch: int, memory: float) -> int:
    """Blocks that a GPU has memory for. Where not even one fits, one: its Gram matrices wait on the host."""
    needed = footprint(shape.block(), [load_recipe(RECIPE)], Load().sample, batch, Load().itemsize)
    return max(1, int((memory - needed.passing) // needed.kept))


def prediction(model: str, gpus: int, batch: int, link: float, factors: Slower) -> tuple[Timeline, Work]:
    (shape, blocks), machine = MODELS[model], Machine()
    work = Work(
        waves=even_waves(blocks, gpus, room(shape, batch, machine.memory)),
        batches=Load().tokens // batch,
        workers=gpus,
        embed_ahead=True,
        nodes=-(-gpus // machine.gpus_per_node),
    )
    return predict(costs(shape, batch, link, factors, machine), work), work


def rows(factors: Slower) -> list[dict[str, Any]]:
    machine, found = Machine(), []
    for model in MODELS:
        for gpus in GPUS:
            for link, rate in (("device to device", machine.network), ("object store", machine.object_store)):
                tried = {batch: prediction(model, gpus, batch, rate, factors) for batch in BATCHES}
                batch, (time, work) = min(tried.items(), key=lambda item: item[1][0].seconds)
                found.append({"model": model, "gpus": gpus, "link": link, "batch_tokens": batch,
                              "waves": len(work.waves), **asdict(time)})  # fmt: skip
    return found


HEADER = ("model", "GPUs", "activations", "tokens of a batch", "waves", "seconds", "start", "read, load", "embed",
          "stream", "fit", "utilisation")  # fmt: skip


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table: parts are those of the critical path."""
    path = row["path"]
    groups = (("start-up",), ("read", "load"), ("embed",),
              ("forward", "transfer", "spool read", "spool write"), ("fit",))  # fmt: skip
    parts = (f"{sum(path.get(name, 0.0) for name in group):.0f}" for group in groups)
    first = (row["model"], str(row["gpus"]), row["link"], str(row["batch_tokens"]), str(row["waves"]))
    return (*first, f"{row['seconds']:.0f}", *parts, f"{row['utilisation']:.0%}")


def main() -> None:
    factors = slower()
    found = rows(factors)
    table = Table(*HEADER, title=f"Predictions, not measurements ({factors.source})")
    for row in found:
        table.add_row(*cells(row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    content = {"recipe": RECIPE, "tokens": Load().tokens, "machine": asdict(Machine()), "rates": asdict(Rates())}
    write_result(RESULTS / "schedule.json", content | {"slower": asdict(factors), "rows": found})


if __name__ == "__main__":
    main()
