"""Rounding, scales and low-rank factors of a block, learned together by the block's output (docs/how/tuning.md).

SignRound (arXiv 2309.05516) learns the first two of them for one block after the other, as AutoRound does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qe_dist.core.errors import ConfigError
from qe_dist.core.manifest import TuningReport
from qe_dist.core.spec import BlockSpec
from qe_dist.methods.block import BlockProblem, Forward, TunedBlock
from qe_dist.numerics.sign_sgd import descend
from qe_dist.numerics.tuned_linear import TunedGroup

FLOAT = 4
STATES = 8
"""Copies of the weights at most: start, offset, its best value and gradient, and what a step computes from them."""
LEAST_ENERGY = 1e-4
"""Share of the median token's squared target; smaller ones count as if they were so large."""
ACTIVATIONS = 6
"""Copies at most of what goes into and comes out of each linear in a step, gradients included."""


@dataclass(frozen=True)
class Tune:
    """Sign-SGD on the squared error of a block's output."""

    steps: int = 200
    batch: int = 8
    """Sequences of a step."""
    rate: float = 1.0
    """Rate of rounding offsets, times `steps`: 1 lets an offset pass through half of its range."""
    clip_rate: float = 1.0
    """Rate of scales, relative to `rate`."""
    factor_rate: float = 1.0
    """Rate of factors, in steps of their 4-bit grid, relative to `rate`."""
    checks: int = 10
    """How often the held-out loss is measured."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"tuning.{name} must be at least 1, found {getattr(self, name)}")
        for name in ("rate", "clip_rate", "factor_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"tuning.{name} must be finite and not negative, found {getattr(self, name)}")

    def check(self, recipe: Any) -> None:
        """Raises ConfigError for a compensation whose parts cannot be learned."""
        if not recipe.compensation.tunable:
            name = recipe.describe()["compensation"]["name"]
            raise ConfigError(
                f"tune learns one adapter for every token, and compensation {name} stores something else; take lqer, "
                f"qera, aser or none with tune, or {name} without it"
            )

    def tune(self, block: BlockProblem) -> TunedBlock:
        """Returns the block's groups with the least held-out loss, and how it went."""
        twins = {
            name: TunedGroup(group, block.weights(name), block.factor_bits) for name, group in block.groups.items()
        }
        part = block.part or range(self.steps)
        made = part.start if block.training is None else max(part.start, block.training.step)
        objective, draws = _Loss(block, block.place(twins)), islice(_draws(block, self.batch), made, None)
        held_out = block.held_out.nonzero().squeeze(1)
        learned = [one for twin in twins.values() for one in twin.learned(self.clip_rate, self.factor_rate)]
        descent, training = descend(
            learned,
            lambda _: objective(next(draws)),
            lambda: objective.over(held_out, self.batch),
            self.steps,
            self.rate / self.steps,
            min(self.checks, self.steps),
            block.watch,
            part,
            block.training,
            block.keep,
        )
        error = descent.after**0.5 if math.isfinite(descent.after) else None
        done = partial(TuningReport, self.steps, descent.step, descent.left, error, descent.nonfinite)
        if part.stop == self.steps and not descent.step:
            return TunedBlock(block.groups, done(kept="closed form"), training)
        tuned = {name: twin.quantized() for name, twin in twins.items()}
        return TunedBlock(tuned, done(kept="tuned"), training)

    def working_bytes(self, block: BlockSpec, longest: int) -> int:
        """Counts the bytes at most that `tune` holds beside its problem. longest: tokens of the longest sequence."""
        ends = sum(g.in_features + sum(x.out_features for x in g.linears) for g in block.groups)
        return FLOAT * (STATES * block.num_weights + ACTIVATIONS * self.batch * longest * ends)


class _Loss:
    """Squared error of the outputs of some sequences, each token's relative to its own squared target: what follows
    normalises tokens one by one, and the first token of a sequence may be ten thousand times as large as the others."""

    def __init__(self, block: BlockProblem, forward: Forward) -> None:
        self.block, self.forward = block, forward
        energy = block.targets.float().square().sum(-1)
        least = LEAST_ENERGY * energy[block.real].nanmedian()
        self.weights = block.real / energy.clamp_min(least.clamp_min(torch.finfo(energy.dtype).tiny))

    def _sums(self, rows: Int[Tensor, " R"]) -> Float[Tensor, "2"]:
        """Sum over tokens, and their number."""
        y = self.forward(rows).float()
        target, weights = (t[rows, : y.shape[1]] for t in (self.block.targets, self.weights))
        real = self.block.real[rows, : y.shape[1]]
        wrong = (y - target.float()).square().sum(-1)
        return torch.stack([(wrong * weights)[real].sum(), real.sum().to(wrong)])

    def __call__(self, rows: Int[Tensor, " R"]) -> Float[Tensor, ""]:
        """Mean over tokens, with gradients."""
        total, count = self._sums(rows)
        mean: Tensor = total / count
        return mean

    @torch.no_grad()
    def over(self, rows: Int[Tensor, " R"], batch: int) -> float:
        """Mean over tokens, without gradients, so many sequences at a time."""
        total, count = reduce(torch.add, [self._sums(part).double() for part in rows.split(batch)])
        return float(total / count)


def _draws(block: BlockProblem, batch: int) -> Iterator[Int[Tensor, " R"]]:
    """Numbers of sequences that are not held out, in an order of their own for each block; all of them before one comes
    again."""
    seen, left = (~block.held_out).nonzero().squeeze(1).cpu(), torch.zeros(0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(block.seed)
    while True:
        while len(left) < batch:
            left = torch.cat([left, seen[torch.randperm(len(seen), generator=generator)]])
        yield left[:batch]
        left = left[batch:]


METHOD = Tune
