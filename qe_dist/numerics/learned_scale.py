"""Scales as free parameters: MASQuant's training on the mean absolute error of rounded outputs (arXiv 2603.04800).

||Q(X / s) Q(W s)^T - X W^T||_1 is lowered by AdamW on log s, so a scale stays positive. Rounding passes gradients
straight through; the steps of both grids follow the scale, for what a scale does above all is to move the largest
value of a token or of a row.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qe_dist.core.errors import NumericalError
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.scale_search import rounded_output


@dataclass(frozen=True)
class ScaleTraining:
    """Settings of `learn_scale`: AdamW on log s, with `batch` tokens per step."""

    steps: int = 256
    batch: int = 128
    lr: float = 5e-2
    seed: int = 0


def learn_scale(
    x: Float[Tensor, "T I"],
    weight: Float[Tensor, "O I"],
    start: Float[Tensor, " I"],
    scheme: Scheme,
    training: ScaleTraining,
) -> Float[Tensor, " I"]:
    """The scale after training, or the start where training did not lower the error of all these tokens."""
    exact = x @ weight.T
    # float64: processors differ in the last bits of float32 logarithms, powers and roots, and a scale decides codes.
    log = start.double().log().requires_grad_()
    optimizer = torch.optim.AdamW([log], lr=training.lr, weight_decay=0.0)
    draw = torch.Generator().manual_seed(training.seed)
    with torch.enable_grad():
        for _ in range(training.steps):
            rows = torch.randint(len(x), (min(training.batch, len(x)),), generator=draw).to(x.device)
            loss = (_trainable_output(x[rows], weight, log.exp().to(x), scheme) - exact[rows]).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    end = log.detach().exp().to(start)
    if not torch.isfinite(end).all():
        raise NumericalError("the training of a scale met a NaN or Inf")

    def error(scale: Tensor) -> Tensor:
        stored = scale.bfloat16().to(x)
        return (rounded_output(x, weight, stored, scheme) - exact).abs().mean()

    return end if error(end) < error(start) else start


def _trainable_output(x: Tensor, weight: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """`rounded_output` with gradients, but for the bf16 of the weight's steps."""
    groups = (weight * scale).unflatten(1, (-1, scheme.group_size or weight.shape[1]))
    top = 2 ** (scheme.weight_bits - 1)
    rounded = _rounded(groups, -top, top - 1).flatten(1)
    tokens = x / scale
    if scheme.act_bits is not None:
        top = 2 ** (scheme.act_bits - 1) - 1
        tokens = _rounded(tokens, -top, top)
    return tokens @ rounded.T


def _rounded(values: Tensor, lowest: int, highest: int) -> Tensor:
    """The values on a symmetric grid that is as wide as the largest |value| of the last dimension needs."""
    step = (values.abs().amax(dim=-1, keepdim=True) / ((highest - lowest) / 2)).clamp_min(
        torch.finfo(values.dtype).tiny
    )
    exact = values / step
    return (exact + (exact.round() - exact).detach()).clamp(lowest, highest) * step
