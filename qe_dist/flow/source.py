"""The model that a run quantizes."""

import torch

from qe_dist import archs
from qe_dist.core.determinism import pin
from qe_dist.core.source import WeightSource
from qe_dist.flow.config import RunConfig
from qe_dist.io.rotated import RotatedSource
from qe_dist.io.weights import SafetensorsSource


def open_source(run: RunConfig) -> WeightSource:
    """The model on disk, rewritten as the recipe asks. Reads headers, and gains of norms."""
    source = SafetensorsSource(run.model)
    rotation = run.recipe.rotation
    if rotation is None:
        return source
    pin(run.threads)  # its weights are sums
    sites = archs.for_config(source.config).rotation_sites(source)
    source.prefetch(sites.norms)
    gains = torch.stack([source.get(name).float() for name in sorted(sites.norms)])
    return RotatedSource(source, sites, rotation.bases(sites.widths, gains))
