"""The numbers of the model card: quality of the bundled models, and how large their outlier channels are.

    python training/card.py        writes benchmarks/results/models.json and channels.json

A channel is an outlier where its largest |x| is more than OUTLIER times the median channel's. It is active
for a token where |x_c| exceeds OUTLIER times the token's median |x|.
"""

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from qe_pipelines.evaluate import encode
from qe_pipelines.results import write_result

from qe_dist.checkpoint.evaluate import evaluate
from qe_dist.core.batch import IMAGE, TEXT
from qe_dist.flow.calibrate import Embedder
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import prepare_run
from qe_dist.flow.plan import StagePlan
from qe_dist.flow.stage import Stage
from qe_dist.methods.recipes import load_recipe
from qe_dist.numerics.stats import GroupStats
from qe_dist.serve.loading import load_model

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
NAMES = ("plain", "outlier")
OUTLIER = 10.0
EVERY_TOKEN = 0.75  # LLM.int8() calls a feature systematic where it is large for three quarters of the positions


def channel_statistics(stats: GroupStats) -> dict[str, float]:
    peak = stats.abs_max.amax(dim=0)
    outliers = (peak > OUTLIER * peak.median()).nonzero().squeeze(1)
    x, modality = stats.sample.x.abs(), stats.sample.modality
    active = x[:, outliers] > OUTLIER * x.median(dim=1, keepdim=True).values.clamp_min(1e-6)
    share = active.float().mean(dim=0)
    text, image = (active[modality == m].float().mean(dim=0) for m in (TEXT, IMAGE))
    own = ((image > 5 * text) | (text > 5 * image)) & (share < EVERY_TOKEN)
    return {
        "peak over median peak": float(peak.max() / peak.median()),
        "outlier channels": float(outliers.numel()),
        "active for every token": float((share >= EVERY_TOKEN).sum()),
        "active for some tokens": float((share < EVERY_TOKEN).sum()),
        "active mostly for one modality": float(own.sum()),
    }


def measure(model: Path, output: Path) -> dict[str, dict[str, float]]:
    """Means over the blocks, by input group."""
    run = RunConfig(model, load_recipe("rtn-w4a8"), MODELS / "data" / "calibration.jsonl", output)
    ready = prepare_run(run)
    with closing(Embedder(run, ready.model.arch)) as embedder, closing(Stage((run,), ready.model.arch)) as stage:
        stage.load(StagePlan(0, ready.model.blocks))
        for i, samples in enumerate(ready.samples):
            stage.forward(embedder.embed(i, samples))
    result = {}
    for group in stage.blocks[0].stats:
        rows = [channel_statistics(block.stats[group]) for block in stage.blocks.values()]
        result[group] = {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}
    return result


def quality(model: Path) -> dict[str, float]:
    """Accuracy in all and by kind, and perplexity, on the evaluation set."""
    summary = evaluate(load_model(model), *encode(model, MODELS / "data" / "evaluation.jsonl")).summary()
    kinds = {kind: row["accuracy"] for kind, row in summary["kinds"].items() if kind != "text"}
    return {"accuracy": summary["accuracy"], **kinds, "perplexity": summary["kinds"]["text"]["perplexity"]}


def main() -> None:
    results = ROOT / "benchmarks" / "results"
    torch.set_num_threads(1)
    write_result(results / "models.json", {"models": {name: quality(MODELS / name) for name in NAMES}})
    with TemporaryDirectory() as work:
        models = {name: measure(MODELS / name, Path(work) / name) for name in NAMES}
    write_result(results / "channels.json", {"models": models})


if __name__ == "__main__":
    main()
