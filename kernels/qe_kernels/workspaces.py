"""The scratch memory of split-K kernels: allocated at the first call, kept for all others.

Launches on one stream follow each other and share it; every stream has its own. All CUDA graphs of a device share one
more, so graphs with these kernels must not replay at the same time on two streams.
"""

import torch

from qe_kernels.split_k import Workspace

FLOATS = 2**23
"""32 MiB of partial sums: twice what `dispatch.heuristic` needs at most."""
TILES = 2**16

_GRAPHS = -1
"""Key of the workspace that CUDA graphs use, in place of a stream."""
_allocated: dict[tuple[torch.device, int], Workspace] = {}


def workspace_of(device: torch.device) -> Workspace:
    """The workspace of the current stream.

    Raises RuntimeError if it would have to be allocated while a CUDA graph is captured: its counters would be zeroed at
    every replay of that graph, and of no other one.
    """
    if device.type == "cpu":  # Triton's interpreter
        return _of(device, stream=0)
    if torch.cuda.is_current_stream_capturing():
        if (device, _GRAPHS) not in _allocated:
            raise RuntimeError("run the model once before a CUDA graph is captured: qe_kernels has no workspace yet")
        return _of(device, _GRAPHS)
    _of(device, _GRAPHS)
    return _of(device, torch.cuda.current_stream(device).cuda_stream)


def _of(device: torch.device, stream: int) -> Workspace:
    if (device, stream) not in _allocated:
        _allocated[device, stream] = Workspace.allocate(FLOATS, TILES, device)
    return _allocated[device, stream]
