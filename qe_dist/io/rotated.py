"""A rotated model, which computes the same. Each tensor is rotated when it is requested."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from qe_dist.core.rotation import RotationSites, Space
from qe_dist.core.source import WeightSource
from qe_dist.numerics.hadamard import Orthogonal, fused


def gains(source: WeightSource, sites: RotationSites) -> Tensor:
    """Returns the gain of every norm that reads the stream, [norms, channels], in float32."""
    source.prefetch(sites.norms)
    return torch.stack([source.get(name).float() + sites.gain_offset for name in sorted(sites.norms)])


class RotatedSource:
    """The weights of the rotated model. Tensors to quantize come in float32, so that they are rounded only once, all
    others in the source's dtype. Raises CheckpointError for a tensor that is missing."""

    def __init__(self, source: WeightSource, sites: RotationSites, bases: Mapping[Space, Orthogonal]) -> None:
        self.source, self.sites, self.bases = source, sites, bases
        self.folder, self.config = source.folder, sites.config
        for name in self.names():
            self.shape(name)  # raises for a missing tensor before any work

    def names(self) -> Collection[str]:
        return {*self.source.names(), *self.sites.tensors}

    def shape(self, name: str) -> tuple[int, ...]:
        site = self.sites.tensors.get(name)
        return self.source.shape(name if site is None else site.source)

    def get(self, name: str) -> Tensor:
        if name in self.sites.norms:
            return self._kept(name)
        if name not in self.sites.tensors:
            return self.source.get(name)
        site = self.sites.tensors[name]
        tensor = self.source.get(site.source)
        rotated = fused(
            tensor.reshape(len(tensor), -1),  # a bias is a column
            rows=None if site.rows is None else self.bases[site.rows],
            columns=None if site.columns is None else self.bases[site.columns],
            gain=None if site.gain is None else self._moved_gain(site.gain),
            dtype=tensor.dtype if site.stored else torch.float32,
        )
        return rotated.reshape(tensor.shape)

    def prefetch(self, names: Iterable[str]) -> None:
        """Begins to read what these tensors are made of, except the gains of norms, which are small."""
        sites = self.sites.tensors
        self.source.prefetch(dict.fromkeys(sites[n].source if n in sites else n for n in names))

    def _kept(self, norm: str) -> Tensor:
        """The weight of a norm of the rotated model: what gains have in common."""
        weight, offset = self.source.get(norm), self.sites.gain_offset
        return (self.bases["stream"].common_gain(weight.double() + offset) - offset).to(weight.dtype)

    def _moved_gain(self, norm: str) -> Tensor:
        offset = self.sites.gain_offset
        return (self.source.get(norm).double() + offset) / (self._kept(norm).double() + offset)
