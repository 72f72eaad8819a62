"""How well a group was fitted, and what it costs."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qe_dist.core.batch import MODALITIES
from qe_dist.core.cost import cost_of
from qe_dist.core.quantized import FitReport, GroupInput, QuantizedGroup, QuantizedLinear
from qe_dist.methods.base import GroupProblem
from qe_dist.numerics.reference import linear_forward, prepare, route
from qe_dist.numerics.stats import TokenSample


class Errors(NamedTuple):
    """Norm of the output error relative to the output; None where there is no token."""

    total: float | None
    by_modality: Mapping[str, float]
    rounding: float | None
    """The error of the codes without the repair."""


def with_report(
    group: QuantizedGroup, problem: GroupProblem, seconds: float, fallbacks: Sequence[str]
) -> QuantizedGroup:
    """Measures the stored group against the full-precision linears, and counts its cost."""
    start = time.perf_counter()
    seen, held_out = (_errors(group, problem, tokens) for tokens in (problem.stats.sample, problem.stats.held_out))
    cost = cost_of(group)
    report = FitReport(
        error=seen.total,
        error_by_modality=seen.by_modality,
        held_out_error=held_out.total,
        held_out_error_by_modality=held_out.by_modality,
        rounding_error=seen.rounding,
        bytes=cost.stored,
        active_bytes=cost.active,
        macs=cost.macs,
        seconds=seconds + time.perf_counter() - start,
        fallbacks=tuple(fallbacks),
    )
    return replace(group, report=report)


def _errors(group: QuantizedGroup, problem: GroupProblem, tokens: TokenSample) -> Errors:
    if not len(tokens.keys):
        return Errors(None, {}, None)
    x, modality = tokens.x.float(), tokens.modality
    expert = route(group.input, tokens.router_x, modality)
    repaired = prepare(replace(group.input, rotation=()), x, expert, group.scheme, modality)  # tokens are rotated
    bare_input = GroupInput(input_scale=group.input.input_scale)
    bare = prepare(bare_input, x, None, group.scheme, modality)
    exact, wrong, rounded = (torch.zeros(x.shape[0], dtype=torch.float64) for _ in range(3))
    for name, linear in group.linears.items():
        y = x @ problem.weights[name].float().T
        plain = QuantizedLinear(linear.codes, linear.scale)
        exact += y.square().sum(1, dtype=torch.float64).cpu()
        wrong += (y - linear_forward(linear, repaired)).square().sum(1, dtype=torch.float64).cpu()
        rounded += (y - linear_forward(plain, bare)).square().sum(1, dtype=torch.float64).cpu()

    def relative(error: Tensor, rows: Tensor | slice) -> float:
        return float((error[rows].sum() / exact[rows].sum().clamp_min(1e-300)).sqrt())

    by_modality = {
        name: relative(wrong, (modality == m).cpu()) for m, name in enumerate(MODALITIES) if bool((modality == m).any())
    }
    return Errors(relative(wrong, slice(None)), by_modality, relative(rounded, slice(None)))
