"""SERQ: the weights of the loudest channels are a sum of two terms (arXiv 2603.08185).

The first term, R = Q(W~_s) with one scale per output, is stored beside the codes; the codes hold Q(W~ - R), so that
loud columns do not widen the grid of the others. So does the code of the authors; their text has it the other way
round, R = Q(W~_s - codes), which leaves them in that grid. SERQ flattens the input before: SmoothQuant with alpha = 1.

Both terms meet the rounded input, as in the authors' code: Y = Qa(x~) Q(W~ - R)^T + Qa(x~)_s R^T.

Departures. `share` is ours. The order of channels stays: SERQ permutes them offline so that salient ones lie side by
side, which changes no output, and what it saves is in docs/results/accuracy.md. Its activations have 4 bits in groups
of 128, asymmetric; ours follow the number format of the recipe.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.methods.base import NO_COLUMNS, Budget, Correction, ErrorProblem, GroupProblem
from qe_dist.numerics.factors import adapter, column_bits, columns_within, rank_within, store_factor
from qe_dist.numerics.lowrank import gram_product
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class Salient:
    """A second term for the loudest channels; the budget's rank is their number (paper: 128, in 4 bits)."""

    share: float = 1.0
    """Of the budget for salient channels; a whitened adapter for all channels has the rest. The paper: 1."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"compensation.share must lie in 0..1 and be more than 0, found {self.share}")

    def needs(self) -> Needs:
        return Needs(gram=self.share < 1)

    def exempt(self, problem: GroupProblem) -> Tensor:
        return NO_COLUMNS

    def left_to_round(self, problem: GroupProblem, budget: Budget) -> Mapping[str, Tensor]:
        channels, _ = self._sizes(problem, budget)
        return {n: _without_term(w, w, channels, budget.factor_bits) for n, w in problem.weights.items()}

    def fit(self, problem: ErrorProblem) -> Correction:
        channels, rank = self._sizes(problem.problem, problem.budget)
        weight, bits = torch.cat(list(problem.problem.weights.values())), problem.budget.factor_bits
        up = down = None
        if rank:
            error = _without_term(problem.stacked, weight, channels, bits)
            up, down = adapter(error, gram_product(problem.stats.total_gram.to(error.dtype)), rank, bits)
        if not channels.numel():
            return Correction(shared_up=up, shared_down=down)
        return Correction(
            shared_up=up, shared_down=down, salient_channels=channels, salient_columns=weight[:, channels]
        )

    def _sizes(self, problem: GroupProblem, budget: Budget) -> tuple[Tensor, int]:
        """(an even number of channels, the loudest first, for two 4-bit codes share a byte; rank of the adapter)"""
        width = problem.group.in_features
        if budget.extra_bits is None:
            total = budget.rank_for(problem.num_outputs, width)
            count = 2 * math.ceil(self.share * total / 2)
            rank = max(0, total - count)
        else:
            bits = budget.extra_bits * problem.num_weights
            outputs, factor_bits = problem.num_weights // width, budget.factor_bits
            count = min(columns_within(self.share * bits, outputs, factor_bits), width)
            left = bits - column_bits(count, outputs, factor_bits)
            rank = rank_within(left, outputs, width, factor_bits) if self.share < 1 else 0
        peak = problem.stats.abs_max
        if problem.input_scale is not None:  # how loud they came in
            peak = peak * problem.input_scale
        loudest = peak.amax(dim=0).argsort(descending=True, stable=True)
        return loudest[:count], rank


def _without_term(matrix: Tensor, weight: Tensor, channels: Tensor, bits: int) -> Tensor:
    """The matrix less R, exactly as R will be stored."""
    if not channels.numel():
        return matrix
    term = store_factor(weight[:, channels], bits).dense.to(matrix.dtype)
    return matrix.index_copy(1, channels, matrix[:, channels] - term)


METHOD = Salient
