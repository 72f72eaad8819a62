"""Sign-SGD with a learning rate that falls to zero, which keeps the state with the least held-out loss.

SignRound (arXiv 2309.05516): in T steps of rate 1/T, falling linearly, a number moves by 1/2 at most, which is what a
rounding offset needs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Learned:
    """A tensor that training may change."""

    tensor: nn.Parameter
    rate: Float[Tensor, "*_"] | float = 1.0
    """Times the common learning rate: how far a first step moves each number."""
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Descent:
    """How a training went. The tensors that were trained have the values of `step`."""

    step: int
    """After which the held-out loss was least; 0: no step lowered it."""
    before: float
    """Held-out loss before the first step."""
    after: float
    """Held-out loss after `step`; at most `before`."""
    nonfinite: tuple[int, ...]
    """Steps whose loss was NaN or Inf: training went back to the best state, at half the rate."""

    @property
    def left(self) -> float:
        """Share of the held-out loss that is left; 0 where it was not finite and is now."""
        if self.step == 0:
            return 1.0
        return self.after / self.before if math.isfinite(self.before) else 0.0


def descend(
    learned: Sequence[Learned],
    loss: Callable[[int], Tensor],
    held_out: Callable[[], float],
    steps: int,
    rate: float,
    checks: int,
    watch: Callable[[int, float], None] = lambda step, loss: None,
) -> Descent:
    """Trains in place; does nothing where the held-out loss is zero.

    loss: of a step from 0 on, with gradients. held_out: loss of the tensors as they are, asked before the first step
    and `checks` times in even distances, lastly after the last step. watch: is told each of these steps, and the
    loss over that before the first one.
    """
    tensors, held_out = [one.tensor for one in learned], torch.no_grad()(held_out)
    best, best_step, before = _copied(tensors), 0, held_out()
    if before == 0:
        return Descent(0, before, before, ())
    least, damping, nonfinite = before if math.isfinite(before) else math.inf, 1.0, []
    due = {math.ceil(steps * (i + 1) / checks) for i in range(checks)}
    for step in range(steps):
        with torch.enable_grad():
            found = loss(step)
            if torch.isfinite(found):
                gradients = torch.autograd.grad(found, tensors)
                _move(learned, gradients, damping * rate * (1 - step / steps))
        if not torch.isfinite(found):
            nonfinite.append(step)
            damping /= 2
            _restore(tensors, best)
        if step + 1 in due:
            now = held_out()
            watch(step + 1, now / before)
            if now < least:
                best, best_step, least = _copied(tensors), step + 1, now
    _restore(tensors, best)
    return Descent(best_step, before, least if best_step else before, tuple(nonfinite))


@torch.no_grad()
def _move(learned: Sequence[Learned], gradients: Sequence[Tensor], rate: float) -> None:
    """One step against the signs of the gradients, within the bounds."""
    for one, gradient in zip(learned, gradients, strict=True):
        one.tensor.sub_(gradient.sign() * one.rate, alpha=rate)
        if one.bounds is not None:
            one.tensor.clamp_(*one.bounds)


def _copied(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
