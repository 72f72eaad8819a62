"""MBQ: AWQ's search with a mean absolute error in which image tokens count less (arXiv 2412.19509).

loss = (sum over text of |error| + rho * sum over images of |error|) / tokens, rho = mean|dLoss/dy| of image tokens
over that of text tokens (arXiv 2412.19509).

rho is the recipe's `image_weight`. `qe-dist sensitivity` measures it with a backward pass of the whole model, where
that fits into memory: an explicit step, for no process of the pipeline holds a model.

Departures: one rho for all groups, the median over blocks; MBQ has one for attention and one for the MLP of each block,
but none below that median. All text tokens count, where MBQ leaves out those of the prompt: the token sample does not
know them apart. The error is that of the group's own outputs, as in `awq.py`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from qe_dist.core.batch import IMAGE
from qe_dist.core.errors import ConfigError
from qe_dist.methods.base import GroupProblem
from qe_dist.numerics.scale_search import ScaleSearch
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class MBQ(ScaleSearch):
    """Searches how much range should move into the weight, by mean absolute error balanced between modalities."""

    image_weight: float = 0.1
    """rho. The default is for models too large to measure it: 0.126 (3B) and 0.110 (7B) were published for Qwen2.5-VL.
    Measure it where you can (`qe-dist sensitivity`): the bundled models have 1.3 and 2.8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.image_weight < float("inf"):
            raise ConfigError(f"transform.image_weight must be finite and not negative, found {self.image_weight}")

    def needs(self) -> Needs:
        return Needs()

    def loss(self, difference: Float[Tensor, "T O"], modality: Int8[Tensor, " T"]) -> Float[Tensor, ""]:
        weight = torch.where(modality == IMAGE, self.image_weight, 1.0).to(difference)
        return (difference.abs().mean(dim=1) * weight).mean()

    def fit(self, problem: GroupProblem) -> GroupProblem:
        return problem.rescaled(self.best(problem.weights, problem.stats, problem.scheme))


METHOD = MBQ
