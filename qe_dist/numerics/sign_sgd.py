"""Sign-SGD with a learning rate that falls to zero, which keeps the state with the least held-out loss.

SignRound (arXiv 2309.05516): in T steps of rate 1/T, falling linearly, a number moves by 1/2 at most, which is what a
rounding offset needs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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


@dataclass
class Training:
    """A training between two steps: all that it takes to go on with the same bits."""

    values: list[Tensor]
    """Values of the tensors that are learned."""
    best: list[Tensor]
    """Their values after `best_step`."""
    before: float
    least: float
    """Held-out loss of the best values; infinite where none was finite."""
    step: int = 0
    """Number of steps made."""
    best_step: int = 0
    damping: float = 1.0
    """Share of the learning rate that is left after losses that were not finite."""
    nonfinite: tuple[int, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Named tensors for a safetensors file; `from_tensors` is the inverse."""
        numbers = [self.before, self.least, self.step, self.best_step, self.damping]
        named = {"values": self.values, "best": self.best}
        return {f"{name}.{i}": t.detach() for name, each in named.items() for i, t in enumerate(each)} | {
            "numbers": torch.tensor(numbers, dtype=torch.float64),
            "nonfinite": torch.tensor(self.nonfinite, dtype=torch.int64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Training":
        """The training whose `tensors` these are."""
        count = sum(name.startswith("values.") for name in tensors)
        values, best = ([tensors[f"{name}.{i}"] for i in range(count)] for name in ("values", "best"))
        before, least, step, best_step, damping = tensors["numbers"].tolist()
        nonfinite = tuple(tensors["nonfinite"].tolist())
        return cls(values, best, before, least, int(step), int(best_step), damping, nonfinite)


def descend(
    learned: Sequence[Learned],
    loss: Callable[[int], Tensor],
    held_out: Callable[[], float],
    steps: int,
    rate: float,
    checks: int,
    watch: Callable[[int, float], None] = lambda step, loss: None,
    part: range | None = None,
    training: Training | None = None,
    keep: Callable[[Training], None] = lambda training: None,
) -> tuple[Descent, Training]:
    """Trains in place; does nothing where the held-out loss is zero.

    loss: of a step from 0 on, with gradients. held_out: loss of the tensors as they are, asked before the first step
    and `checks` times in even distances, lastly after the last step. watch: is told each of these steps, and the
    loss over that before the first one. part: the steps to make now; None: all. The losses may be others in each part,
    so the best state is looked for anew. It is restored after the last part alone. training: where an earlier call
    ended, at the end of a part or within it. keep: is given the training after each step.
    """
    part, tensors, held_out = part or range(steps), [one.tensor for one in learned], torch.no_grad()(held_out)
    if training is None or training.step <= part.start:
        training = _begun(tensors, held_out, part, training)
    else:
        _restore(tensors, training.values)
        training.values = list(tensors)
    due = {math.ceil(steps * (i + 1) / checks) for i in range(checks)}
    for step in range(training.step, part.stop if training.before else 0):
        _make_step(learned, loss, step, rate * (1 - step / steps), training)
        if step + 1 in due:
            now = held_out()
            watch(step + 1, now / training.before)
            if now < training.least:
                training.best, training.best_step, training.least = _copied(tensors), step + 1, now
        keep(training)
    if part.stop == steps or not training.before:
        _restore(tensors, training.best)
    best, before = training.best_step, training.before
    return Descent(best, before, training.least if best else before, training.nonfinite), training


def _begun(
    tensors: Sequence[nn.Parameter], held_out: Callable[[], float], part: range, training: Training | None
) -> Training:
    """A training before the first step of a part. The tensors are as before the first of all steps, which is the best
    state where what came of the parts before is not better."""
    before = held_out()
    begun = Training(list(tensors), _copied(tensors), before, before if math.isfinite(before) else math.inf, part.start)
    if training is None:
        return begun
    _restore(tensors, training.values)
    begun.damping, begun.nonfinite = training.damping, training.nonfinite
    if (now := held_out()) < begun.least:
        begun.best, begun.best_step, begun.least = _copied(tensors), part.start, now
    return begun


def _make_step(
    learned: Sequence[Learned], loss: Callable[[int], Tensor], step: int, rate: float, training: Training
) -> None:
    """Moves the tensors, or restores the best ones where the loss is not finite."""
    tensors = [one.tensor for one in learned]
    with torch.enable_grad():
        found = loss(step)
        if torch.isfinite(found):
            _move(learned, torch.autograd.grad(found, tensors), training.damping * rate)
    if not torch.isfinite(found):
        training.nonfinite = (*training.nonfinite, step)
        training.damping /= 2
        _restore(tensors, training.best)
    training.step = step + 1


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
