"""The model that a run quantizes."""

from qe_dist import archs
from qe_dist.core.determinism import pin
from qe_dist.core.source import WeightSource
from qe_dist.flow.config import RunConfig
from qe_dist.io.padded import PaddedSource, paddable
from qe_dist.io.rotated import RotatedSource, gains
from qe_dist.model import open_model
from qe_dist.numerics.sharding import padding_step


def open_source(run: RunConfig) -> WeightSource:
    """The model on disk, rewritten as recipe and tensor-parallel size ask. Reads headers, and gains of norms."""
    return rewritten(run, open_model(run.model).source)


def rewritten(run: RunConfig, source: WeightSource) -> WeightSource:
    """A model as recipe and tensor-parallel size ask for it."""
    source = _rotated(run, source)
    group = paddable(archs.for_config(source.config).groups(source.config))
    step = padding_step(run.recipe.scheme, run.tensor_parallel_size)
    if group is None or group.in_features % step == 0:
        return source
    arch, width = archs.for_config(source.config), -(-group.in_features // step) * step
    return PaddedSource(source, arch.spec(source), arch.widened(source.config, width), width)


def _rotated(run: RunConfig, source: WeightSource) -> WeightSource:
    rotation = run.recipe.rotation
    if rotation is None:
        return source
    pin(run.threads)  # its weights are sums
    sites = archs.for_config(source.config).rotation_sites(source)
    return RotatedSource(source, sites, rotation.bases(sites.widths, gains(source, sites)))
