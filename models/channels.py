"""Per-channel statistics of the bundled models: how large their outlier channels are, and for which tokens.

    python models/channels.py        writes benchmarks/results/channels.json

A channel is an outlier where its largest |x| is more than OUTLIER times the median channel's. It is active
for a token where |x_c| exceeds OUTLIER times the token's median |x|.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from qe_pipelines.results import write_result

from qe_dist.core.batch import IMAGE, TEXT
from qe_dist.flow.calibrate import Embedder, make_batches
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import prepare_run
from qe_dist.flow.stage import Stage
from qe_dist.methods.recipes import load_recipe
from qe_dist.numerics.stats import GroupStats

HERE = Path(__file__).parent
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
    run = RunConfig(model, load_recipe("rtn-w4a8"), HERE / "data" / "calibration.jsonl", output)
    samples = make_batches(run)
    _, plan, _ = prepare_run(run, len(samples))
    embedder, stage = Embedder(run, plan.model.arch), Stage(run, plan.model.arch, plan.stages[0])
    stage.load()
    for i, part in enumerate(samples):
        stage.forward(embedder.input_of(0, i, part))
    result = {}
    for group in stage.blocks[0].stats:
        rows = [channel_statistics(block.stats[group]) for block in stage.blocks]
        result[group] = {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}
    return result


def main() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as work:
        models = {name: measure(HERE / name, Path(work) / name) for name in ("plain", "outlier")}
    write_result(HERE.parent / "benchmarks" / "results" / "channels.json", {"models": models})


if __name__ == "__main__":
    main()
