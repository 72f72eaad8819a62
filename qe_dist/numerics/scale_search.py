"""The search that AWQ and MBQ share: which power of the inputs' size, as a scale, leaves the smallest output error.

s = size^a, a on a grid in [0, 1), clamped at 1e-4 and divided by sqrt(max s * min s) (AWQ, arXiv 2306.00978;
methods.md section 6). The error is that of the outputs on some tokens, x / s rounded as at run time and W s plainly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from qe_dist.core.errors import ConfigError, NumericalError
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.grid import dequantize, round_activations, round_to_grid, weight_scale
from qe_dist.numerics.stats import GroupStats

SMALLEST = 1e-4


@dataclass(frozen=True)
class ScaleSearch:
    """Tries scales and keeps the one of smallest `loss`; no scale at all is among them."""

    grid: int = 20
    """Exponents that are tried, evenly in [0, 1); AWQ and MBQ: 20."""
    tokens: int = 512
    """Sampled tokens on which the outputs are compared."""
    size: Literal["auto", "mean", "max"] = "auto"
    """Size of a channel, by which scales are made: mean|x| (AWQ, MBQ) or max|x| (SmoothQuant, SVDQuant). auto:
    max where the grid of a token reaches its largest channel, mean where only weights are rounded or the largest
    channels are not rounded (docs/experiments.md)."""

    def __post_init__(self) -> None:
        if self.grid < 1 or self.tokens < 1:
            raise ConfigError(f"transform.grid and .tokens must be at least 1, found {self.grid} and {self.tokens}")
        if self.size not in ("auto", "mean", "max"):
            raise ConfigError(f"transform.size must be auto, mean or max, found {self.size!r}")

    def loss(self, difference: Float[Tensor, "T O"], modality: Int8[Tensor, " T"]) -> Float[Tensor, ""]:
        """The number that the search minimises. difference: outputs with rounding minus outputs without."""
        raise NotImplementedError

    def best(
        self, weights: Mapping[str, Float[Tensor, "_ I"]], stats: GroupStats, scheme: Scheme
    ) -> Float[Tensor, " I"]:
        """The scale of smallest loss, in float32; the first of equal ones."""
        weight = torch.cat(list(weights.values()))
        x, modality = stats.sample.x[: self.tokens].to(weight), stats.sample.modality[: self.tokens]
        reaches_largest = scheme.act_bits is not None and scheme.dynamic_outliers is None
        by_mean = self.size == "mean" or (self.size == "auto" and not reaches_largest)
        candidates = power_scales(stats.mean_abs if by_mean else stats.abs_max.amax(dim=0), self.grid)
        exact = x @ weight.T
        outputs = (rounded_output(x, weight, scale.to(x), scheme) for scale in candidates)
        losses = torch.stack([self.loss(y - exact, modality).double() for y in outputs]).nan_to_num(torch.inf)
        if not torch.isfinite(losses).any():
            raise NumericalError("every scale of the search gives outputs with a NaN or Inf")
        return candidates[losses.argmin()]


def power_scales(size: Float[Tensor, " I"], grid: int) -> Float[Tensor, "G I"]:
    """The candidates, rounded to the bf16 in which a scale is stored; the first changes nothing.

    A channel that no token uses keeps its size [INF]: its scale would be the smallest of all, and a token that
    does use it at run time would spend all of its grid on it.
    """
    powers = torch.arange(grid, device=size.device) / grid
    scale = (size ** powers[:, None]).clamp_min(SMALLEST)
    scale = scale / (scale.amax(dim=1) * scale.amin(dim=1)).sqrt()[:, None]
    return torch.where(size > 0, scale, 1.0).bfloat16().float()


def rounded_output(
    x: Float[Tensor, "T I"], weight: Float[Tensor, "O I"], scale: Float[Tensor, " I"], scheme: Scheme
) -> Float[Tensor, "T O"]:
    """Q(x / s) Q(W s)^T with RTN."""
    wide = weight * scale
    steps = weight_scale(wide, scheme.weight_bits, scheme.group_size)
    rounded = dequantize(round_to_grid(wide, steps, scheme.weight_bits), steps, x.dtype)
    return round_activations(x / scale, scheme) @ rounded.T
