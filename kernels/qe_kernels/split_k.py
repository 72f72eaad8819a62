"""Deterministic split-K: programs that share an output tile leave partial sums, and the last to arrive adds them.

Few tokens make few output tiles, too few to fill a GPU, so the sum over K is split as well. The partial sums are added
in the order of the splits, never in the order of arrival: equal inputs give equal bits. One launch, no memset.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qe_kernels.triton_if_any import tl, triton


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of split-K kernels, allocated once per device.

    Launches on one stream may share it, for one ends before the next begins. Launches that may overlap need one each:
    other streams, and programmatic dependent launches that touch it before `gdc_wait`.
    """

    partials: Tensor
    """float32 [floats], contents of no meaning."""
    counters: Tensor
    """int32 [tiles], zero before every launch: each launch leaves them at zero, so CUDA graphs replay as they are."""

    @classmethod
    def allocate(cls, floats: int, tiles: int, device: torch.device | str) -> "Workspace":
        return cls(torch.empty(floats, device=device), torch.zeros(tiles, dtype=torch.int32, device=device))

    def check(self, tiles: int, split_k: int, tile_size: int) -> None:
        """ValueError where `tiles` output tiles of `tile_size` numbers, each in `split_k` parts, find no room."""
        if split_k == 1:
            return
        for name, room, needed in (
            ("partials", self.partials.numel(), tiles * split_k * tile_size),
            ("counters", self.counters.numel(), tiles),
        ):
            if room < needed:
                raise ValueError(f"workspace.{name}: expected room for at least {needed}, found {room}")


@triton.jit
def reduce_splits(acc, partials, counter, split, SPLIT_K: tl.constexpr):
    """(sum over splits, whether this program is the last of its tile and holds that sum).

    acc: float32 [rows, columns], this program's part; split: its number, 0 .. SPLIT_K - 1.
    partials: pointer to the tile's own SPLIT_K x rows x columns floats of `Workspace.partials`.
    counter: pointer to the tile's own number in `Workspace.counters`; the last program sets it back to zero.

    All SPLIT_K programs of a tile must come here, also those whose part of K is empty. Where `last` is false the
    returned sum is only the program's own part, and the program has nothing more to do. SPLIT_K = 1 costs nothing, and
    neither pointer is used.
    """
    last = SPLIT_K == 1
    if SPLIT_K > 1:
        size: tl.constexpr = acc.shape[0] * acc.shape[1]
        at_once: tl.constexpr = 4096 // size if size < 4096 else 1  # tiles in flight, as far as registers go
        place = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
        tl.store(partials + split * size + place, acc)
        tl.debug_barrier()  # one thread counts for all: first let all have stored
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT_K - 1
        if last:
            acc = tl.zeros_like(acc)
            for other in tl.range(SPLIT_K, loop_unroll_factor=at_once):
                acc += tl.load(partials + other * size + place, cache_modifier=".cg")
            tl.store(counter, 0)
    return acc, last
