"""The embed stage: samples -> hidden states before the first block, once per run."""

from collections.abc import Sequence
from dataclasses import dataclass

from qe_dist import archs
from qe_dist.archs.base import Encoder, Prelude
from qe_dist.core.batch import Batch
from qe_dist.core.determinism import pin
from qe_dist.core.sample import Sample
from qe_dist.data.samples import load_images, read
from qe_dist.flow.config import RunConfig
from qe_dist.flow.source import open_source
from qe_dist.io.run_dir import RunDir
from qe_dist.io.spool import Spool


@dataclass(frozen=True)
class Calibration:
    """The samples of a run, each of which the model can take."""

    batches: list[list[Sample]]
    """In their order, `samples_per_batch` at a time."""
    tokens: int
    """Tokens of the largest batch, padding included."""
    fingerprint: str
    """The same for the same samples, whatever form of source they come from."""
    notes: tuple[str, ...]
    """What is to be said of them, a line each."""
    left_out: tuple[str, ...]
    """Samples that are left out, each with the reason."""


def read_calibration(run: RunConfig, encoder: Encoder) -> Calibration:
    """Reads the samples and encodes each once, so that what is wrong with one is said before any work."""
    found = read(run.calibration, run.reading, encoder)
    size, count = run.samples_per_batch, len(found.samples)
    batches = [found.samples[i : i + size] for i in range(0, count, size)]
    tokens = max(min(size, count - i) * max(found.lengths[i : i + size]) for i in range(0, count, size))
    return Calibration(batches, tokens, found.fingerprint, tuple(found.notes), tuple(found.left_out))


class Embedder:
    """Makes the inputs of block 0. Embeddings and vision tower are loaded when the first batch is asked for."""

    def __init__(self, run: RunConfig, arch: str) -> None:
        self.run, self.arch = run, archs.get(arch)
        self.arch.warm_up()
        self.spool = Spool(RunDir(run.output))
        self.prelude: Prelude | None = None
        self.encoder: Encoder | None = None

    def embed(self, index: int, samples: Sequence[Sample]) -> Batch:
        """Returns batch `index` as it enters block 0, and spools it."""
        pin(self.run.threads)  # a setting of the thread, and this need not be the one that ran `__init__`
        if self.prelude is None or self.encoder is None:
            source = open_source(self.run)
            self.encoder = self.arch.encoder(source.folder)
            self.prelude = self.arch.prelude(source, self.run.embeds_on, self.run.dtype)
        batch = self.prelude([self.encoder(s, load_images(s)) for s in samples], index)
        self.spool.put(0, batch)
        return batch

    def spool_only(self, index: int, samples: Sequence[Sample]) -> None:
        """Spools the batch as it enters block 0, without returning it."""
        self.embed(index, samples)

    def flush(self) -> None:
        """Returns when every embedded batch is on disk."""
        self.spool.flush()

    def close(self) -> None:
        """Ends the threads of the spool. Batches that were not flushed may be missing."""
        self.spool.close()
