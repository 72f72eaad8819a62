"""MBQ: AWQ's search with a mean absolute error in which image tokens count less (arXiv 2412.19509).

loss = (sum over text of |error| + rho * sum over images of |error|) / tokens, rho = mean|dLoss/dy| of image tokens
over that of text tokens (methods.md section 5.1).

Departures: MBQ measures rho for every block with a backward pass of the whole model. Here no process ever holds the
model, so rho is one number for all groups, `image_weight`; `benchmarks/quality/sensitivity.py` measures it on models
that fit. All text tokens count, where MBQ leaves out those of the prompt: the token sample does not know them apart.
The error is that of the group's own outputs, as in `awq.py`.
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
    """rho. Published for Qwen2.5-VL: 0.126 (3B) and 0.110 (7B). On the bundled models, with some eight tokens to an
    image, image tokens count more instead (benchmarks/results/sensitivity.json)."""

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
