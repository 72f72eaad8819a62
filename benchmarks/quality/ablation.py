"""The rows of `ablation/*.toml`: what each part of `qe` and of the paper's recipe is worth, on the outlier model.

python benchmarks/quality/ablation.py       writes benchmarks/results/ablation.json
"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from qe_cluster.launch import ray_cluster
from qe_pipelines.compare import fit
from qe_pipelines.evaluate import encode
from qe_pipelines.measuring import measure
from qe_pipelines.progress import set_up_logging
from qe_pipelines.results import write_result

from qe_dist.flow.config import RunConfig
from qe_dist.flow.evaluate import evaluate
from qe_dist.methods.recipes import load_recipe
from qe_dist.serve.loading import load_model

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODELS, RESULTS = ROOT / "models", ROOT / "benchmarks" / "results"
SLOW = "w4a6-paper-refined"
"""Trains for minutes a block."""


def main(
    models: Annotated[str, typer.Option(help="of the bundled ones")] = "outlier",
    slow: Annotated[bool, typer.Option(help=f"run {SLOW} too")] = False,
    workers: Annotated[int, typer.Option(help="Ray workers")] = 2,
) -> None:
    """Fits and measures every row."""
    set_up_logging(None)
    rows = [row for row in sorted((HERE / "ablation").glob("*.toml")) if slow or row.stem != SLOW]
    calibration, found = MODELS / "data" / "calibration.jsonl", {}
    for model in models.split(","):
        encoded = encode(MODELS / model, MODELS / "data" / "evaluation.jsonl")
        full = evaluate(load_model(MODELS / model), *encoded).summary()
        with tempfile.TemporaryDirectory() as temporary, ray_cluster(None, workers):
            output = Path(temporary)
            runs = [
                RunConfig(MODELS / model, load_recipe(str(row)), calibration, output / row.stem, workers)
                for row in rows
            ]
            fit(runs)
            entries = [
                {"seed": 0, "arithmetic": run.recipe.scheme.arithmetic, **vars(entry)}
                for run, entry in zip(runs, measure(runs, *encoded), strict=True)
            ]
        found[model] = {"full": full, "entries": entries}
        write_result(RESULTS / "ablation.json", {"seeds": [0], "models": found})


if __name__ == "__main__":
    typer.run(main)
