"""The modules that run a quantized checkpoint in transformers: parameters named as on disk.

A `QEInput` module holds what belongs to the tensor that q, k and v (or gate and up) read, and prepares
that tensor once for all of them.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from qe_dist.core.layout import TensorSpecs
from qe_dist.core.quantized import GroupInput, input_from_tensors, repair_from_tensors
from qe_dist.core.scheme import Scheme
from qe_dist.serve.group import Group, backend
from qe_dist.serve.modality import TokenModality

M = TypeVar("M", bound=nn.Module)


def submodule(block: nn.Module, name: str, kind: type[M]) -> M:
    """The submodule of this name. TypeError where it is of another kind."""
    found = block.get_submodule(name)
    if not isinstance(found, kind):
        raise TypeError(f"{name} is a {type(found).__name__}, expected a {kind.__name__}")
    return found


def _add_parameters(module: nn.Module, specs: TensorSpecs) -> None:
    for name, spec in specs.items():
        module.register_parameter(name, nn.Parameter(spec.empty(), requires_grad=False))


class QEInput(nn.Module):
    """Scale, down matrices and router of an input group, and the choice of experts for groups that read it.

    Holds what it prepared only until the last linear of the group has come.
    """

    def __init__(
        self, scheme: Scheme, specs: TensorSpecs, linears: Sequence[nn.Linear], modality: TokenModality
    ) -> None:
        super().__init__()
        self.scheme, self.modality = scheme, modality
        self.in_features = linears[0].in_features
        self.num_linears = self._linears_left = len(linears)
        self._readers: list[QEInput] = []  # in a list, so that they are no submodules
        self._group: Group | None = None
        self._seen: Tensor | None = None
        self._prepared: Any = None
        _add_parameters(self, specs)
        self.by_modality = self.part.by_modality

    @property
    def part(self) -> GroupInput:
        return input_from_tensors(dict(self.named_parameters()))

    def route_on(self, source: "QEInput") -> None:
        """Lets the router read the input of a group (not its own, if that is cut among ranks)."""
        if self.part.router is not None:
            source._readers.append(self)

    def forward(self, x: Tensor) -> Any:
        """x [.., I] as the linears of the group want it; computed for the first of them, kept for the others."""
        if self._seen is not x:
            rows = x.flatten(0, -2)
            modality = self.modality.of(rows) if self.by_modality else None
            self._prepared = self.group(x).prepare(rows, modality)
            self._seen, self._linears_left = x, self.num_linears
        prepared = self._prepared
        self._linears_left -= 1
        if self._linears_left == 0:
            self._prepared = self._seen = None
        return prepared

    def group(self, x: Tensor) -> Group:
        """What runs on tensors like x; made when it is first needed."""
        if self._group is None:
            run = backend(x.device, x.dtype)
            self._group = Group(run.Input(self.part, self.scheme, self.in_features))
            for reader in self._readers:
                self._group.choose_for(reader.group(x), reader.get_parameter("router"))
        return self._group

    def forget(self) -> None:
        """What was made from the parameters, which are to be offloaded."""
        self._group = None

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._group = None
        return super()._apply(*args, **kwargs)


class QELinear(nn.Module):
    """A quantized linear; the same call as nn.Linear. While it runs, the packed weights are where they run best."""

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    offloaded = False
    """Whether accelerate takes the parameters away when the block has run (serve/offload.py)."""

    def __init__(self, scheme: Scheme, specs: TensorSpecs, group: QEInput, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme = scheme
        self._group = (group,)
        self._linear: Any = None
        _add_parameters(self, specs)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self._linear is None:
            repair = repair_from_tensors({n: p for n, p in self.named_parameters() if n != "bias"})
            run = backend(x.device, x.dtype)
            self._linear = run.Linear(self.weight_packed.data, self.weight_scale, repair, self.scheme, x.shape[-1])
            if not self.offloaded:
                self.weight_packed.data = self.weight_packed.new_empty(0)
        y = self._linear(self._group[0](x), self.bias, x.dtype)
        return y.unflatten(0, x.shape[:-1])

    def forget(self) -> None:
        """What was made from the parameters, which are to be offloaded."""
        self._linear = None

    def _stop(self) -> None:
        """Packs the weights as on disk."""
        if self._linear is not None:
            self.weight_packed.data = self._linear.words()
            self._linear = None

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._stop()
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any) -> None:
        self._stop()
        super()._save_to_state_dict(*args)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}"
