"""SERQ: the weights of the loudest channels are a sum of two terms (arXiv 2603.08185, methods.md section 3).

The first term, R = Q(W~_s) with one scale per output, is stored beside the codes; the codes hold Q(W~ - R), so that
loud columns do not widen the grid of the others. So does the code of the authors; their text has it the other way
round, R = Q(W~_s - codes), which leaves them in that grid. SERQ flattens the input before: SmoothQuant with alpha = 1.

Both terms meet the rounded input, as in the authors' code: Y = Qa(x~) Q(W~ - R)^T + Qa(x~)_s R^T.

Departures. `share` is ours. The order of channels stays: SERQ permutes them offline so that salient ones lie side by
side, which changes no output, and what it saves is measured in docs/methods.md. Its activations have 4 bits in groups
of 128, asymmetric; ours follow the number format of the recipe.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.methods.base import Budget, Compensation, Correction, ErrorProblem, GroupProblem, LowRank, SalientColumns
from qe_dist.numerics.factors import adapter, column_bits, columns_within, pair_bits, rank_within, store_factor
from qe_dist.numerics.lowrank import gram_product, low_rank_floats
from qe_dist.numerics.stats import Needs


@dataclass(frozen=True)
class Salient(Compensation):
    """A second term for the loudest channels; the budget's rank is their number (paper: 128, in 4 bits)."""

    share: float = 1.0
    """Share of the budget for salient channels; a whitened adapter for all channels gets the rest. The paper: 1."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"compensation.share must lie in 0..1 and be more than 0, found {self.share}")

    def needs(self) -> Needs:
        return Needs(gram=self.share < 1)

    def left_to_round(self, problem: GroupProblem, budget: Budget) -> Mapping[str, Tensor]:
        channels, _ = self._loudest(problem, budget)
        return {n: _without_term(w, w, channels, budget.factor_bits) for n, w in problem.weights.items()}

    def fit(self, problem: ErrorProblem) -> Correction:
        channels, rank = self._loudest(problem.problem, problem.budget)
        weight, bits = torch.cat(list(problem.problem.weights.values())), problem.budget.factor_bits
        shared = None
        if rank:
            error = _without_term(problem.stacked, weight, channels, bits)
            shared = LowRank(*adapter(error, gram_product(problem.stats.total_gram.to(error.dtype)), rank, bits))
        return Correction(shared, salient=SalientColumns(channels, weight[:, channels]) if channels.numel() else None)

    def most_bytes(self, outputs: int, width: int, router_width: int, budget: Budget) -> int:
        count, rank = self._sizes(outputs, width, budget)
        columns, pair = column_bits(count, outputs, budget.factor_bits), 0
        if rank:
            pair = pair_bits(rank, outputs, width, budget.factor_bits)
        return -(-(columns + pair) // 8)

    def working_floats(self, outputs: int, width: int, sample_tokens: int, budget: Budget) -> int:
        _, rank = self._sizes(outputs, width, budget)
        return outputs * width + (width * width + low_rank_floats(outputs, width, rank) if rank else 0)

    def _sizes(self, outputs: int, width: int, budget: Budget) -> tuple[int, int]:
        """(number of salient channels, even since two 4-bit codes share a byte; rank of the adapter)"""
        if budget.extra_bits is None:
            total = budget.rank_for(outputs, width)
            count = 2 * math.ceil(self.share * total / 2)
            return count, max(0, total - count)
        bits, factor_bits = budget.extra_bits * (outputs * width), budget.factor_bits
        count = min(columns_within(self.share * bits, outputs, factor_bits), width)
        left = bits - column_bits(count, outputs, factor_bits)
        return count, rank_within(left, outputs, width, factor_bits) if self.share < 1 else 0

    def _loudest(self, problem: GroupProblem, budget: Budget) -> tuple[Tensor, int]:
        """(salient channels, the loudest first; rank of the adapter)"""
        count, rank = self._sizes(problem.num_outputs, problem.group.in_features, budget)
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
