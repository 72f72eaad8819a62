"""Bootstrap intervals over samples: what a mean over tokens would have been, had other samples been drawn.

Tokens of one sample are not independent, so whole samples are drawn (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13, percentile intervals). Two models are compared on the same draws: the difficulty of a
sample is in both of them and cancels out.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

LEVEL = 0.95
FEWEST = 10
"""Fewest samples for an interval: bootstrap draws of so few say little."""
DRAWS = 4000
AT_ONCE = 2**21
"""Numbers in one matrix of draws, which bounds the memory."""

Interval = tuple[float, float]


def interval(
    sums: Float[Tensor, " S"],
    weights: Float[Tensor, " S"],
    other: Float[Tensor, " S"] | None = None,
    measure: Callable[[Tensor], Tensor] = torch.clone,
    seed: int = 0,
) -> Interval | None:
    """95 % interval of measure(sum of `sums` / sum of `weights`); with `other`, of how much larger it is than
    measure(sum of `other` / sum of `weights`), paired. None below FEWEST samples.

    sums, other: a quantity added up over each sample's tokens. weights: the samples' tokens. measure: of the ratio.
    """
    if len(sums) < FEWEST:
        return None
    given = torch.stack([weights, sums] if other is None else [weights, sums, other], dim=1).double()
    values = []
    generator = torch.Generator().manual_seed(seed)
    size = max(1, AT_ONCE // len(sums))
    for begin in range(0, DRAWS, size):
        chosen = torch.randint(len(sums), (min(size, DRAWS - begin), len(sums)), generator=generator)
        counts = torch.zeros(chosen.shape, dtype=torch.float64)
        counts.scatter_add_(1, chosen, torch.ones(chosen.shape, dtype=torch.float64))
        drawn = counts @ given
        mine = measure(drawn[:, 1] / drawn[:, 0])
        values.append(mine if other is None else mine - measure(drawn[:, 2] / drawn[:, 0]))
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.cat(values).quantile(tails).tolist()
    return low, high
