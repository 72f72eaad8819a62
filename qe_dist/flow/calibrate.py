"""The embed stage: samples -> hidden states before the first block, spooled once per run."""

from collections.abc import Sequence

from qe_dist import archs
from qe_dist.core.batch import Batch
from qe_dist.core.determinism import pin
from qe_dist.core.sample import Sample
from qe_dist.flow.config import RunConfig
from qe_dist.flow.source import open_source
from qe_dist.io.run_dir import RunDir
from qe_dist.io.samples import load_images, read_samples


def make_batches(run: RunConfig) -> list[list[Sample]]:
    """The samples in their order, `samples_per_batch` at a time."""
    samples = read_samples(run.calibration)
    size = run.samples_per_batch
    return [samples[i : i + size] for i in range(0, len(samples), size)]


class Embedder:
    """Feeds the first stage of a wave.

    The vision tower is loaded when a batch is asked for that is not in the spool yet.
    """

    def __init__(self, run: RunConfig, arch: str) -> None:
        pin(run.threads)
        self.run, self.arch = run, archs.get(arch)
        self.store = RunDir(run.output)
        self.prelude = self.encoder = None

    def input_of(self, block: int, index: int, samples: Sequence[Sample]) -> Batch:
        """Batch `index` as it enters a block: out of the spool, or for block 0 from the samples."""
        if block > 0 or self.store.has_batch(block, index):
            return self.store.get_batch(block, index)
        if self.prelude is None or self.encoder is None:
            source = open_source(self.run)
            self.encoder = self.arch.encoder(source.folder)
            self.prelude = self.arch.prelude(source, self.run.device, self.run.dtype)
        batch = self.prelude([self.encoder(s, load_images(s)) for s in samples], index)
        self.store.put_batch(block, batch)
        return batch

    def spool(self, index: int, samples: Sequence[Sample]) -> None:
        """Makes the batch ready for block 0 without handing it over."""
        self.input_of(0, index, samples)
