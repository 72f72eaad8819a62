"""Which channels stretch the grids of tokens: without them, the largest |x_c| that a grid has to reach falls most.

Rounding a token to its own grid errs by about (largest |x_c|)^2 / (12 q^2) in every channel, so what a list of channels
is worth is the mean over tokens of that largest square, without the list.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def stretching_channels(x: Float[Tensor, "T I"], count: int) -> Int[Tensor, " C"]:
    """The `count` channels whose absence takes most off the mean over tokens of max |x_c|^2, in the order chosen.

    Greedy: next comes the channel that takes most off what those before it have left; its tokens fall to their next
    largest channel. A channel that is the largest one of no token comes last, by its energy. Exact for one channel;
    for more it may miss tokens with several channels of about the same size (tests: at most 5 % off the best list on
    small problems).
    """
    count = min(count, x.shape[1])
    peaks, owner = x.abs().topk(min(count + 1, x.shape[1]), dim=1)  # no list can make a token fall further
    peaks = peaks.double().square()
    energy = x.square().sum(dim=0, dtype=torch.float64)
    tie_break = 1e-12 * energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
    gone = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    chosen = []
    first, second, largest = _two_largest(peaks, owner, gone)
    for _ in range(count):
        drop = torch.zeros_like(energy).index_add_(0, largest, first - second)
        score = drop / drop.sum().clamp_min(torch.finfo(torch.float64).tiny) + tie_break
        channel = score.masked_fill(gone, -1.0).argmax()
        chosen.append(channel)
        gone[channel] = True
        first, second, largest = _two_largest(peaks, owner, gone)
    return torch.stack(chosen) if chosen else torch.zeros(0, dtype=torch.int64, device=x.device)


def _two_largest(peaks: Tensor, owner: Tensor, gone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(largest square of each token that is not gone, the second largest, channel of the largest)."""
    if peaks.shape[1] == 1:
        left = peaks.masked_fill(gone[owner], 0.0)[:, 0]
        return left, torch.zeros_like(left), owner[:, 0]
    left, place = peaks.masked_fill(gone[owner], 0.0).topk(2, dim=1)
    return left[:, 0], left[:, 1], owner.gather(1, place[:, :1])[:, 0]
