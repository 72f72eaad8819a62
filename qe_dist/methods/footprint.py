"""Memory that a block takes while its statistics are gathered and while it is fitted, counted from its shapes.

All numbers are upper bounds: where groups or steps follow each other, the largest one counts. Memory that stays
allocated is counted apart from memory that one step uses, because a worker keeps the statistics of several blocks, but
streams and fits them one at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qe_dist.core.spec import BlockSpec, InputGroup
from qe_dist.methods.base import Shares
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.transforms.none import NoTransform
from qe_dist.numerics.gram import PANEL
from qe_dist.numerics.stats import M, Needs

ROTATING = 3
"""Copies of an input that exist at once while it is rotated: the original, what a factor reads, and what it makes."""
FLOAT = 4
"""Bytes of a number in statistics and fits, which are float32."""


@dataclass(frozen=True)
class Sequences:
    """The calibration as tuning sees it."""

    count: int
    longest: int
    """Tokens of the longest sequence."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device for one block."""

    weights: int
    """Weights in the dtype of the forward pass."""
    grams: int
    """Gram matrices, which may be kept on the host instead."""
    widest_gram: int
    """Gram matrices of the widest group, which a fit needs on the device in any case."""
    sample: int
    """Token samples of all groups, and the router inputs of the same tokens."""
    forward: int
    """Used while one batch passes: activations, and the work of the statistics on them."""
    fit: int
    """Used while the block is fitted: weights, errors and codes of all its groups, and the work on one of them."""
    tune: int = 0
    """Used while the block is tuned: its inputs and targets of the whole calibration, and the training."""

    @property
    def kept(self) -> int:
        """Bytes that stay allocated from loading the block until it is published."""
        return self.weights + self.statistics

    @property
    def statistics(self) -> int:
        """Bytes of Gram matrices and token samples."""
        return self.grams + self.sample

    @property
    def passing(self) -> int:
        """Bytes that a step uses and frees again, at most."""
        return max(self.forward, self.fit, self.tune)

    @property
    def peak(self) -> int:
        """Bytes of a worker with one block; each further block adds `kept`."""
        return self.kept + self.passing


def footprint(
    block: BlockSpec,
    recipes: Sequence[Recipe],
    sample_tokens: int,
    batch_tokens: int,
    itemsize: int,
    calibration: Sequences | None = None,
) -> Footprint:
    """Bytes that a block takes when one pass of the calibration serves these recipes.

    sample_tokens: tokens that a group's sample keeps, held-out ones included. batch_tokens: tokens of the largest
    batch, padding included. itemsize: bytes of a weight and of an activation in the forward pass, 2 on a GPU, 4 on a
    CPU. calibration: what runs that tune keep of it.
    """
    needs = Needs()
    for recipe in recipes:
        needs |= recipe.needs()
    widths = {g.name: g.in_features for g in block.groups}
    grams = [M * w * w if needs.gram else 0 for w in widths.values()]
    sample = sample_tokens * sum(w + widths[g.router_input] for w, g in zip(widths.values(), block.groups, strict=True))
    fits = [_fit(block, recipe, sample_tokens) for recipe in recipes]
    as_float = 0 if itemsize == FLOAT else FLOAT * block.num_weights
    rotated = [g for g in block.groups if any(r.rotation and r.rotation.at_run_time(g, ranks=1) for r in recipes)]
    turning = max((ROTATING * FLOAT * batch_tokens * g.in_features for g in rotated), default=0)
    as_rotated = FLOAT * sum(g.in_features * x.out_features for g in rotated for x in g.linears)
    return Footprint(
        weights=itemsize * block.num_weights,
        grams=FLOAT * sum(grams),
        widest_gram=FLOAT * max(grams),
        sample=FLOAT * sample,
        forward=_forward(block, needs, sample_tokens, batch_tokens, itemsize) + turning,
        fit=as_float + as_rotated + max(fits),
        tune=max((_tune(block, recipe, itemsize, calibration) for recipe in recipes), default=0),
    )


def _tune(block: BlockSpec, recipe: Recipe, itemsize: int, calibration: Sequences | None) -> int:
    """Bytes of a tuning: inputs and targets, each twice while they are put together, and what the tuner holds."""
    if recipe.tuning is None or calibration is None:
        return 0
    hidden = block.groups[0].in_features
    kept = 4 * itemsize * calibration.count * calibration.longest * hidden
    return kept + recipe.tuning.working_bytes(block, calibration.longest)


def _forward(block: BlockSpec, needs: Needs, sample_tokens: int, tokens: int, itemsize: int) -> int:
    """Bytes for one batch: the inputs of all groups, with and without padding, what the block holds beside them, and
    the statistics of the widest one."""
    widest = max(g.in_features for g in block.groups)
    inputs = tokens * (2 * itemsize * sum(g.in_features for g in block.groups) + FLOAT * block.scratch)
    by_modality = (2 * itemsize + 8) * tokens * widest  # a copy, its size, and that in float64 to be summed
    panel = FLOAT * min(PANEL, widest) * widest if needs.gram else 0
    sample = 2 * FLOAT * 2 * sample_tokens * widest
    return inputs + max(by_modality, panel + itemsize * tokens * widest, sample)


def _fit(block: BlockSpec, recipe: Recipe, sample_tokens: int) -> int:
    """Bytes of a fit. Until the groups have shared the block's budget it keeps their errors and codes, their
    transformed weights and statistics, and their weights without the channels that lists carry."""
    drafts = (FLOAT + 1) * block.num_weights
    if not isinstance(recipe.transform, NoTransform):
        widths = [g.in_features for g in block.groups]
        grams = M * sum(w * w for w in widths) if recipe.needs().gram else 0
        drafts += FLOAT * (block.num_weights + grams + sample_tokens * sum(widths))
    if recipe.list_bits:
        drafts += FLOAT * (block.num_weights + sample_tokens * sum(g.in_features for g in block.groups))
    return drafts + max(_group(g, recipe, sample_tokens) for g in block.groups)


def _group(group: InputGroup, recipe: Recipe, sample_tokens: int) -> int:
    """Bytes of the largest step among rounding, repairing and measuring one group. Each term counts the matrices that
    exist at once: Gram matrices, weights of the group or of its largest linear, outputs of the token sample."""
    width, outputs = group.in_features, sum(x.out_features for x in group.linears)
    gram = width * width if recipe.needs().gram else 0
    whole, linear = outputs * width, max(x.out_features for x in group.linears) * width
    rounding = whole + max(3 * gram, 2 * gram + 4 * whole) if recipe.quantizer.needs().gram else 4 * whole
    repairing = recipe.compensation.working_floats(outputs, width, sample_tokens, recipe.budget)
    weighing = gram + 3 * whole
    measuring = 2 * linear + sample_tokens * (6 * width + 3 * outputs)
    budgeted = recipe.budget.extra_bits is not None and not isinstance(recipe.compensation, Shares)
    tried = 2 * whole if budgeted else 0  # a draft with exempted columns, while that without them is made
    return FLOAT * (tried + max(rounding, repairing, weighing, measuring))
