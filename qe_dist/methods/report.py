"""How well a group was fitted, and what it costs."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qe_dist.core.batch import MODALITIES
from qe_dist.core.cost import cost_of
from qe_dist.core.quantized import FitReport, GroupInput, QuantizedGroup, QuantizedLinear
from qe_dist.methods.base import GroupProblem
from qe_dist.numerics.reference import linear_forward, prepare, route


def with_report(
    group: QuantizedGroup, problem: GroupProblem, seconds: float, fallbacks: Sequence[str]
) -> QuantizedGroup:
    """Measures the stored group on the token sample against the full-precision linears, and counts its cost."""
    start = time.perf_counter()
    sample = problem.stats.sample
    x, modality = sample.x.float(), sample.modality
    expert = route(group.input, sample.router_x, modality)
    repaired = prepare(group.input, x, expert, group.scheme, modality)
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
    cost = cost_of(group)
    report = FitReport(
        error=relative(wrong, slice(None)) if x.shape[0] else None,
        error_by_modality=by_modality,
        rounding_error=relative(rounded, slice(None)) if x.shape[0] else None,
        bytes=cost.stored,
        active_bytes=cost.active,
        macs=cost.macs,
        seconds=seconds + time.perf_counter() - start,
        fallbacks=tuple(fallbacks),
    )
    return replace(group, report=report)
