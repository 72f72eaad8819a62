"""Compares a recipe of your own with GPTQ: one pass of the calibration, two checkpoints, errors of every layer.

    python examples/recipe.py OUTPUT [MODEL CALIBRATION]

Without MODEL the bundled models/plain and its calibration data are taken: about a minute on one CPU core.
"""

import sys
from dataclasses import replace
from pathlib import Path

from qe_dist.core.scheme import Scheme
from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.io.checkpoint import read_manifest
from qe_dist.methods.base import Budget
from qe_dist.methods.compensation.qera import QERA
from qe_dist.methods.quantizers.gptq import GPTQ
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.recipes import load_recipe
from qe_dist.methods.transforms.smoothquant import SmoothQuant

MODELS = Path(__file__).parents[1] / "models"
MINE = Recipe(Scheme.parse("w4a8"), SmoothQuant(alpha=0.6), GPTQ(), QERA(), Budget(extra_bits=0.5, factor_bits=8))


def main(output: str, model: str = str(MODELS / "plain"), data: str = str(MODELS / "data/calibration.jsonl")) -> None:
    mine = RunConfig(model, MINE, Path(data), Path(output) / "mine")
    gptq = replace(mine, recipe=load_recipe("gptq-w4a8"), output=Path(output) / "gptq")
    local.quantize(mine, gptq)
    for run in (mine, gptq):
        print(f"{run.output}: {read_manifest(run.output).bits_per_weight:.2f} bits per weight")


if __name__ == "__main__":
    main(*sys.argv[1:])
