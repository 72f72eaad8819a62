"""Which groups of linears can be cut over tensor-parallel ranks: each rule gives a line for what cannot.

The rules of quantized tensors are those of `sharding.py`, which the engines follow, too; those of attention heads are
vLLM's: query heads are dealt out whole, and a key-value head may be on several ranks.
"""

from collections.abc import Collection, Iterator

from qe_dist.core.scheme import Scheme
from qe_dist.core.spec import InputGroup, LinearSpec
from qe_dist.numerics.sharding import why_not

BY_MODALITY = "treats text and image tokens differently, which vLLM does not know; serve with transformers"


def parts_of(linear: LinearSpec, size: int) -> int:
    """How many different parts of a linear `size` ranks hold: fewer than ranks where they share key-value heads."""
    return size if linear.heads is None else min(size, linear.heads)


def vision_problems(heads: int, size: int) -> Iterator[str]:
    """A line where the heads of the vision tower do not divide over `size` ranks."""
    if heads % size:
        yield f"the {heads} heads of the vision tower do not divide over {size} ranks"


def together_problems(name: str, linears: Collection[str], of_model: Collection[InputGroup]) -> Iterator[str]:
    """A line where these linears are not a whole group of the model, which vLLM computes as one."""
    if {*linears} not in [{x.name for x in group.linears} for group in of_model]:
        yield f"{name}: fitted by itself, but vLLM computes the linears of one input at once; fit them as a group"


def routed_problems(name: str, read: tuple[LinearSpec, ...], size: int) -> Iterator[str]:
    """A line where a rank has only a part of what the router reads. read: linears of the group whose input that is."""
    if size > 1 and read[0].split == "row":
        yield f"{name}: its router reads the input of {read[0].name}, of which a rank has only a part"


def cut_problems(name: str, linears: tuple[LinearSpec, ...], scheme: Scheme, size: int, mixed: int) -> Iterator[str]:
    """A line where heads, scale groups or packed words do not divide over `size` ranks. mixed: input channels that a
    rotation at run time mixes."""
    most = max(x.heads or 0 for x in linears)
    for x in linears:
        if x.heads and x.heads % size and (x.heads == most or size % x.heads):
            yield f"{name}: the {x.heads} heads of {x.name} do not divide over {size} ranks"
            return
    outputs = {x.name: x.out_features for x in linears if x.heads is None}  # whole heads are whole outputs
    if why := why_not(scheme, outputs, linears[0].in_features, linears[0].split, size, mixed):
        yield f"{name}: {why}"
