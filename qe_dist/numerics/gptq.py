"""GPTQ: channels that are still to be rounded make up for the error so far (arXiv 2210.17323).

It looks for codes with a small e H e^T in every row: e = w - Q(w), and H is X^T X with some damping.

GPTQ is published with the upper Cholesky factor of H^-1. This is its other form (QuIP, arXiv 2307.13304, theorem 6),
which inverts nothing. With H = L L^T

    e H e^T = sum over j of (e_j L_jj + sum over i > j of e_i L_ij)^2,

so channels go from the last to the first, and channel j is rounded to the point nearest to

    w_j + sum over i > j of e_i L_ij / L_jj.

The sums are taken by halves: the error of one half goes into the other as one matrix product, and so on within each
half. A weight [O, I] costs I^3 / 3 + O I^2 FLOP, nearly all of it in LAPACK and GEMM.

Beyond the paper: each row may choose among several multiples of its scales the one that leaves it the least error
after all. That is clipping, judged by what GPTQ makes of it; another O I^2 for each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from qe_dist.core.errors import NumericalError
from qe_dist.numerics.clipping import scaled
from qe_dist.numerics.grid import dequantize, round_to_grid, weight_scale

CHANNELS = 128
"""Channels whose codes are made at a time after all points are chosen, which bounds the memory."""


def gptq(
    weight: Float[Tensor, "O I"],
    gram: Float[Tensor, "I I"],
    bits: int,
    group_size: int | None,
    *,
    scale: Float[Tensor, "O G"] | None = None,
    factors: Sequence[float] = (1.0,),
    damping: float = 0.01,
    act_order: bool = True,
) -> tuple[Int8[Tensor, "O I"], Float[Tensor, "O G"]]:
    """Codes and bf16 scales. Raises NumericalError where the Gram matrix has a NaN or Inf.

    act_order: the channels with the largest inputs are rounded first, with the scales of the original weight. Without
    it channels are rounded in their order, and a group's scale is computed when the group's turn comes, from its
    weights as the groups before have changed them. scale: used as given. factors: multiples of the scales that are
    tried; each row keeps the one with the least error. damping: added to the Gram matrix's diagonal, relative to its
    mean.
    Channels that are not live get code 0 and take no part in the error feedback.
    """
    live = live_channels(weight, gram)
    late = scale is None and group_size is not None and not act_order
    start = weight_scale(weight * live, bits, group_size) if scale is None else scale
    order = live.nonzero().squeeze(1)
    if order.numel() == 0:
        return torch.zeros_like(weight, dtype=torch.int8), start.to(torch.bfloat16)
    if act_order:
        order = order[gram.diagonal()[order].argsort(descending=True, stable=True)]
    order = order.flip(0)  # what goes first lies last
    group = (order // (weight.shape[1] // start.shape[1])).tolist()
    feedback, pivot = _feedback(gram.index_select(0, order).index_select(1, order).to(weight.dtype), damping)
    layer = _Layer(weight.index_select(1, order).T.contiguous(), group, feedback, pivot, bits)
    best = layer.round(scaled(start, factors[0]), factors[0] if late else None)
    for factor in factors[1:]:
        best = best.or_better(layer.round(scaled(start, factor), factor if late else None))
    if not torch.isfinite(best.loss).all():
        raise NumericalError("the error of GPTQ is a NaN or Inf")
    codes = torch.zeros_like(weight.T, dtype=torch.int8).index_copy(0, order, best.codes)
    return codes.T.contiguous(), best.scale


def live_channels(weight: Float[Tensor, "O I"], gram: Float[Tensor, "I I"]) -> Bool[Tensor, " I"]:
    """Channels with any nonzero input and any nonzero weight. Columns that a compensation carries itself are zero."""
    return weight.any(dim=0) & (gram.diagonal() != 0)


def _feedback(gram: Float[Tensor, "L L"], damping: float) -> tuple[Float[Tensor, "L L"], Float[Tensor, " L"]]:
    """L_ij / L_jj of the damped Gram matrix, and L_jj up to a common factor. Uses up its argument: at the width of 72B
    a copy takes 3.5 GB."""
    size = torch.linalg.vector_norm(gram, torch.inf)  # one number scales the problem, as in `low_rank`
    if not torch.isfinite(size):
        raise NumericalError("the Gram matrix has a NaN or Inf")
    gram = gram.div_(size)
    gram.diagonal().add_(damping * gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise NumericalError(f"the Gram matrix of {len(gram)} channels is not positive definite at damping {damping}")
    pivot = factor.diagonal().clone()
    return factor.div_(pivot), pivot


@dataclass(frozen=True)
class _Rounded:
    codes: Int8[Tensor, "L O"]
    scale: Float[Tensor, "O G"]
    loss: Float[Tensor, " O"]

    def or_better(self, other: "_Rounded") -> "_Rounded":
        """Takes the rows of `other` whose loss is smaller."""
        wins = other.loss < self.loss
        return _Rounded(
            torch.where(wins, other.codes, self.codes),
            torch.where(wins[:, None], other.scale, self.scale),
            torch.where(wins, other.loss, self.loss),
        )


@dataclass(frozen=True)
class _Layer:
    """The live channels of a weight, one row each, in the reverse of the order in which they are rounded."""

    weight: Float[Tensor, "L O"]
    group: list[int]
    """Scale group of each channel."""
    feedback: Float[Tensor, "L L"]
    pivot: Float[Tensor, " L"]
    bits: int

    def round(self, scale: Float[Tensor, "O G"], late: float | None) -> _Rounded:
        """The weight rounded with these scales. late: each scale is replaced by this multiple of RTN's when its group's
        turn comes."""
        work = self.weight.clone()  # what each channel asks to be rounded to
        error = torch.empty_like(work)
        steps = scale.to(work.dtype).T.contiguous()
        for low, high in [(0, len(work))] if late is None else _spans(self.group):
            if late is not None:
                g = self.group[low]
                scale[:, g, None] = scaled(weight_scale(self.expected(work, low, high), self.bits, None), late)
                steps[g] = scale[:, g]
            self._settle(work, error, steps, low, high)
            work[:low].addmm_(self.feedback[low:high, :low].T, error[low:high])
        return self._rounded(work, scale)

    def _settle(self, work: Tensor, error: Tensor, steps: Tensor, low: int, high: int) -> None:
        """Rounds the channels high - 1 .. low, which the error of all those from `high` on has reached.

        As few calls as possible for a channel: on a GPU they, not their work, are what it costs. No closure, for one
        that calls itself would keep `work` and `error` until Python looks for cycles.
        """
        if high - low == 1:
            step, top = steps[self.group[low]], 2 ** (self.bits - 1)
            point = (work[low] / step).round_().clamp_(-top, top - 1).mul_(step)
            torch.sub(self.weight[low], point, out=error[low])
            return
        middle = (low + high) // 2
        self._settle(work, error, steps, middle, high)
        work[low:middle].addmm_(self.feedback[middle:high, low:middle].T, error[middle:high])
        self._settle(work, error, steps, low, middle)

    def _rounded(self, work: Float[Tensor, "L O"], scale: Float[Tensor, "O G"]) -> _Rounded:
        """Codes and loss of every row. work: the values that channels are rounded to, error feedback included."""
        codes, loss = torch.empty_like(work, dtype=torch.int8), torch.zeros_like(work[0])
        for low in range(0, len(work), CHANNELS):
            part = slice(low, low + CHANNELS)
            step = scale.T[self.group[part]]
            found = round_to_grid(work[part], step, self.bits)
            missed = work[part] - dequantize(found, step, work.dtype)
            codes[part] = found
            loss += (missed * self.pivot[part, None]).square().sum(dim=0)
        return _Rounded(codes, scale, loss)

    def expected(self, work: Float[Tensor, "L O"], low: int, high: int) -> Float[Tensor, "O _"]:
        """The weights of the channels high - 1 .. low that would best make up for the error so far.

        In `work` each of them stands as if it had to do so alone.
        """
        exact = self.weight[low:high]
        within = self.feedback[low:high, low:high].T
        missing: Tensor = torch.linalg.solve_triangular(within, work[low:high] - exact, upper=True)
        return (exact + missing).T


def _spans(group: list[int]) -> Iterator[tuple[int, int]]:
    """(low, high) of each run of equal neighbours, from the last run to the first."""
    high = len(group)
    for _, same in groupby(reversed(group)):
        low = high - len(list(same))
        yield low, high
        high = low
