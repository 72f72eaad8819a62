"""MASQuant: a learned scale for each modality, and a weight that is smoothed by that of text (arXiv 2603.04800).

s_m = sqrt(max|x_m| / max|W|) to begin with, then trained on the mean absolute error of Q(X_m / s_m) Q(s_m W), each
modality for itself (arXiv 2603.04800). Only Q(s_text W) is stored, which is not what image tokens need: the
compensation `cross_modal` has to repair that, and no other can. The input of `down`, which other linears of the block
make, is not smoothed (MASQuant's code).

Departures: all linears of a group share their scales, where MASQuant has some for each; the error is that of the
group's own outputs, where MASQuant takes the block's; modalities do not share a loss, so its weights lambda drop out.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qe_dist.core.batch import MODALITIES
from qe_dist.core.errors import ConfigError
from qe_dist.methods.base import GroupProblem
from qe_dist.methods.recipe import Recipe
from qe_dist.numerics.learned_scale import ScaleTraining, learn_scale
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class MASQuant:
    """A scale for text and one for images."""

    steps: int = 64
    """Training steps of 128 tokens; 0 keeps the first scales. MASQuant has 256; the error stops falling before 64."""
    lr: float = 5e-2
    """Learning rate of AdamW on log s (MASQuant's code)."""
    tokens: int = 512
    """Sampled tokens of each modality to train on."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.tokens < 1 or not 0 < self.lr < 1:
            raise ConfigError(
                "transform.steps must not be negative, .tokens at least 1 and .lr between 0 and 1, "
                f"found {self.steps}, {self.tokens} and {self.lr}"
            )

    def check(self, recipe: Recipe) -> None:
        if not recipe.compensation.by_modality:
            found = recipe.describe()["compensation"]["name"]
            raise ConfigError(
                f"transform masquant and compensation {found} do not go together: the weight is smoothed for text, "
                "and only compensation cross_modal makes it right for images; "
                f"take cross_modal, or with {found} a transform with one scale, such as mbq"
            )

    def needs(self) -> Needs:
        return Needs(images=True)

    def fit(self, problem: GroupProblem) -> GroupProblem:
        if problem.group.producers:
            return problem
        weight = torch.cat(list(problem.weights.values()))
        return problem.rescaled(torch.stack([self._scale(problem, weight, m) for m in range(len(MODALITIES))]))

    def _scale(self, problem: GroupProblem, weight: Tensor, modality: int) -> Float[Tensor, " I"]:
        peaks = problem.stats.abs_max
        # A channel that this modality does not use keeps the other's scale, so that nothing is left to repair there.
        peak = torch.where(peaks[modality] > 0, peaks[modality], peaks.amax(dim=0))
        heaviest = weight.abs().amax(dim=0).to(peak)
        ratio = (peak / heaviest.clamp_min(1e-5)).double().sqrt().to(peak)
        start = torch.where((peak > 0) & (heaviest > 0), ratio, 1.0)
        x = _tokens(problem, modality, self.tokens)
        return learn_scale(x, weight, start, problem.scheme, ScaleTraining(self.steps, lr=self.lr, seed=problem.seed))


def _tokens(problem: GroupProblem, modality: int, count: int) -> Float[Tensor, "T I"]:
    """Sampled tokens of this modality; where all of them had a NaN, those of the other one."""
    sample = problem.stats.sample
    own = sample.x[sample.modality == modality]
    return (own if len(own) else sample.x)[:count].to(next(iter(problem.weights.values())))


METHOD = MASQuant
