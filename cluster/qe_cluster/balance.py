"""Which worker fits which input group. Pure functions, without Ray."""

from collections.abc import Collection, Mapping, Sequence

from qe_dist.core.spec import InputGroup
from qe_dist.flow.config import needs_of
from qe_dist.flow.plan import FitJob, Task
from qe_dist.numerics.stats import M

REMOTE_COST = 1.2
"""Cost of a fit on another worker than the one that has the data, relative to its cost there."""


def balance(
    costs: Mapping[FitJob, float],
    owners: Mapping[FitJob, int],
    speeds: Sequence[float],
    stay: Collection[FitJob] = (),
) -> dict[FitJob, int]:
    """Returns the worker that fits each job.

    A job moves away from its owner only when the other worker finishes it before the owner would have. The longest
    jobs are placed first, each on the worker that finishes it first.

    costs: multiplications of each job. owners: the worker that has its weights and statistics. speeds: of each worker,
    relative to the others. stay: jobs that are too large to move.
    """
    busy = [0.0] * len(speeds)
    for job, owner in owners.items():
        busy[owner] += costs[job] / speeds[owner]
    placed = dict(owners)
    for job in sorted(costs.keys() - set(stay), key=lambda j: (-costs[j], j.block, j.run, j.group)):
        owner = owners[job]
        other = min(range(len(speeds)), key=lambda w: (busy[w] + costs[job] / speeds[w], w))
        if busy[other] + REMOTE_COST * costs[job] / speeds[other] < busy[owner]:
            busy[owner] -= costs[job] / speeds[owner]
            busy[other] += REMOTE_COST * costs[job] / speeds[other]
            placed[job] = other
    return placed


def fit_cost(group: InputGroup) -> float:
    """Multiplications of a fit, roughly: factorizing the Gram matrix, and a few products of weights with it."""
    width, outputs = group.in_features, sum(x.out_features for x in group.linears)
    return float(width) ** 3 + 4.0 * outputs * width**2


def travel_bytes(group: InputGroup, task: Task, block: int) -> int:
    """Bytes sent to another worker that fits a group: weights, Gram matrices and token sample, in float32."""
    width, outputs = group.in_features, sum(x.out_features for x in group.linears)
    gram = M * width * width if needs_of(task.runs, block).gram else 0
    return 4 * (width * outputs + gram + 2 * task.sampled_tokens * width)
