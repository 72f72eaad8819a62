"""A model whose MLPs are wider by channels that are zero. It computes the same and can be sharded over more ranks.

The linears that produce these channels get zero rows, and those that read them zero columns.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from qe_dist.core.source import WeightSource
from qe_dist.core.spec import InputGroup, ModelSpec


def paddable(groups: Iterable[InputGroup]) -> InputGroup | None:
    """The group of a block whose input can be padded, since its producers make it channel by channel; None if none."""
    return next((group for group in groups if group.producers), None)


class PaddedSource:
    """The weights of the padded model.

    model: the model of `source`, whose blocks have a paddable group. config: config.json of the padded model. width: of
    the group, in channels.
    """

    def __init__(self, source: WeightSource, model: ModelSpec, config: Mapping[str, Any], width: int) -> None:
        self.source, self.model, self.width = source, model, width
        self.folder, self.config = source.folder, config
        padded = [(block, group) for block in model.blocks if (group := paddable(block.groups)) is not None]
        self.before = padded[0][1].in_features
        self._dimension: dict[str, int] = {}
        """The dimension of each tensor that is padded."""
        for block, group in padded:
            for name in group.producers:
                self._dimension |= {f"{block.prefix}{name}.{part}": 0 for part in ("weight", "bias")}
            self._dimension |= {f"{block.prefix}{linear.name}.weight": 1 for linear in group.linears}

    def names(self) -> Collection[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = list(self.source.shape(name))
        if name in self._dimension:
            shape[self._dimension[name]] = self.width
        return tuple(shape)

    def get(self, name: str) -> Tensor:
        tensor = self.source.get(name)
        if name not in self._dimension:
            return tensor
        behind = (0, 0) * (tensor.ndim - 1 - self._dimension[name])  # pad counts dimensions from the last one
        return pad(tensor, (*behind, 0, self.width - self.before))

    def prefetch(self, names: Iterable[str]) -> None:
        self.source.prefetch(names)
