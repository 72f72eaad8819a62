"""Would lists of channels by class of tokens pay? What is left of the largest squares, on what `experts.py` prepared.

Rounding a token to its own grid errs by about its largest square; the figure is the mean over held-out tokens of
max |x_c|^2 / ||x||^2 without the listed channels, over the same with all channels. Lists by class have half of their
channels in common. Classes of tokens are found with their lists, in turn; at run time a router would choose (least
squares on |x|, as Quant Experts has it), or the modality of the token, which is known. Activations are not smoothed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from experts_model import BlockData, HeldOut
from qe_pipelines.results import write_result
from torch import Tensor

from qe_dist.core.batch import IMAGE
from qe_dist.methods.base import GroupProblem
from qe_dist.numerics.peaks import stretching_channels
from qe_dist.numerics.routing import choose_experts, regress_errors

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "experts_lists.json"
SHARE, CLASSES, ROUNDS = 0.01, (2, 4, 8), 8
TIMES = (1, 2, 4)
"""One list of so many times the share."""


def main(prepared: Mapping[str, Path]) -> None:
    models = {name: measured(folder) for name, folder in prepared.items()}
    write_result(RESULT, {"share": SHARE, "models": models})


def measured(folder: Path) -> list[dict[str, Any]]:
    """Every group of every other block."""
    rows = []
    for index, file in enumerate(sorted(folder.glob("block-*.pt"))):
        if index % 2:
            data: BlockData = torch.load(file, weights_only=False)
            rows += [
                {"block": index, "group": name, "left": left(problem, data.held_out[name])}
                for name, problem in data.problems.items()
            ]
    return rows


def left(problem: GroupProblem, held_out: HeldOut) -> dict[str, float]:
    """Of the held-out tokens' largest squares, by kind of list."""
    seen, held = (_unit(x) for x in (problem.stats.sample.x, held_out.x))
    whole = _peaks(held, []).mean()
    count = max(1, int(SHARE * seen.shape[1]))
    found = {f"one list x{n}": _peaks(held, stretching_channels(seen, n * count)).mean() for n in TIMES}
    modality = problem.stats.sample.modality
    if (modality == IMAGE).any() and (held_out.modality == IMAGE).any():
        lists = _lists(seen, count, (modality == IMAGE).long(), 2)
        own = (held_out.modality == IMAGE).long()
        found["by modality"] = _peaks_by(held, lists).gather(1, own[:, None]).mean()
    for classes in CLASSES:
        lists = _classes(seen, count, classes)
        router = regress_errors(seen, _peaks_by(seen, lists))
        chosen = choose_experts(held, router)
        peaks = _peaks_by(held, lists)
        found[f"{classes} classes, router"] = peaks.gather(1, chosen[:, None]).mean()
        found[f"{classes} classes, oracle"] = peaks.min(dim=1).values.mean()
    return {name: round(float(value / whole), 4) for name, value in found.items()}


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-20)


def _peaks(x: Tensor, channels: Tensor | list[int]) -> Tensor:
    """The largest square of each token without these channels. [T]"""
    return x.index_fill(1, torch.as_tensor(channels, dtype=torch.int64), 0.0).abs().amax(dim=1).square()


def _peaks_by(x: Tensor, lists: list[Tensor]) -> Tensor:
    """[T, classes]"""
    return torch.stack([_peaks(x, own) for own in lists], dim=1)


def _lists(x: Tensor, count: int, of_token: Tensor, classes: int) -> list[Tensor]:
    """For each class, the common half and what its own tokens want beside it."""
    common = stretching_channels(x, (count + 1) // 2)
    rest = x.index_fill(1, common, 0.0)
    own = [rest[of_token == i] if (of_token == i).any() else rest for i in range(classes)]
    return [torch.cat([common, stretching_channels(tokens, count - len(common))]) for tokens in own]


def _classes(x: Tensor, count: int, classes: int) -> list[Tensor]:
    """Lists whose tokens are those that they serve best; the first classes go by the token's largest channel."""
    of_token = x.index_fill(1, stretching_channels(x, (count + 1) // 2), 0.0).abs().argmax(dim=1) % classes
    for _ in range(ROUNDS):
        lists = _lists(x, count, of_token, classes)
        of_token = _peaks_by(x, lists).argmin(dim=1)
    return lists
