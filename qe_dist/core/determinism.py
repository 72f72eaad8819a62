"""The only place that touches torch's global state."""

import torch


def pin(threads: int) -> None:
    """Fixes what decides the last bits of a result: the number of threads of this process.

    Ray gives an actor one thread, a plain process gets all cores; sums then differ in their last bits.
    """
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
