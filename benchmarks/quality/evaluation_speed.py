"""How long evaluating a checkpoint takes beside its model's own evaluation, in CPU seconds of one thread.

    python benchmarks/quality/evaluation_speed.py MODEL DATA CHECKPOINT ...

writes benchmarks/results/evaluation_speed.json. The model in full precision applies one head, a checkpoint its own and
the reference's. CPU seconds, because they hardly depend on what else the machine does; loading is not counted.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from qe_pipelines.evaluate import encode
from qe_pipelines.results import write_result

from qe_dist.checkpoint.evaluate import evaluate, save_reference
from qe_dist.serve.loading import load_model

ROOT = Path(__file__).parents[2]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    before = time.process_time()
    return work(), time.process_time() - before


def main(model: Path, data: Path, *checkpoints: Path) -> None:
    torch.set_num_threads(1)
    arch, examples = encode(model, data)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        full = load_model(model)
        reference = save_reference(full, arch, examples, Path(folder))
        _, seconds = timed(lambda: evaluate(full, arch, examples))
        for checkpoint in checkpoints:
            loaded = load_model(checkpoint)
            evaluate(loaded, arch, examples[:1])  # unpacks the weights, once
            found, own = timed(lambda loaded=loaded: evaluate(loaded, arch, examples, reference))
            rows.append(
                {"recipe": checkpoint.name, "cpu_seconds": own, "ratio": own / seconds, "kl": found.summary()["kl"]}
            )
            print(rows[-1], flush=True)
    result = {"model": model.name, "tokens": sum(examples.lengths), "full_precision_cpu_seconds": seconds, "rows": rows}
    write_result(ROOT / "benchmarks" / "results" / "evaluation_speed.json", result)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
