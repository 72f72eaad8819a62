"""AWQ: the power of the inputs' size whose rounded outputs have the smallest mean square error (arXiv 2306.00978).

Departures: the error is that of the group's own outputs, where AWQ takes those of attention and of the MLP;
activations are rounded where the scheme rounds them, and then max|x| is the size (`transform.size`); there is no
search for clipping, which belongs to the quantizer.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int8
from torch import Tensor

from qe_dist.methods.base import GroupProblem
from qe_dist.numerics.scale_search import ScaleSearch
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class AWQ(ScaleSearch):
    """Searches how much range should move into the weight, by mean square error."""

    def needs(self) -> Needs:
        return Needs()

    def loss(self, difference: Float[Tensor, "T O"], modality: Int8[Tensor, " T"]) -> Float[Tensor, ""]:
        return difference.square().mean()

    def fit(self, problem: GroupProblem) -> GroupProblem:
        return problem.rescaled(self.best(problem.weights, problem.stats, problem.scheme))


METHOD = AWQ
