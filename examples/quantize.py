"""Quantizes a model in one process, without Ray, and says what it costs and how well its layers fit.

    python examples/quantize.py OUTPUT [MODEL CALIBRATION]

Without MODEL the bundled models/plain and its calibration data are taken: under a minute on one CPU core.
"""

import sys
from pathlib import Path

from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.io.checkpoint import read_manifest
from qe_dist.methods.recipes import load_recipe

MODELS = Path(__file__).parents[1] / "models"


def main(output: str, model: str = str(MODELS / "plain"), data: str = str(MODELS / "data/calibration.jsonl")) -> None:
    run = RunConfig(model, load_recipe("qe-w4a8"), Path(data), Path(output))
    local.quantize(run)  # the same call continues a run that was interrupted
    manifest = read_manifest(run.output)
    print(f"{run.output}: {manifest.bits_per_weight:.2f} bits per weight, product in {manifest.arithmetic}")


if __name__ == "__main__":
    main(*sys.argv[1:])
