"""The embed stage: samples -> hidden states before the first block, once per run."""

from collections.abc import Sequence

from qe_dist import archs
from qe_dist.archs.base import Encoder, Prelude
from qe_dist.core.batch import Batch
from qe_dist.core.determinism import pin
from qe_dist.core.sample import Sample
from qe_dist.data.samples import load_images, read_samples
from qe_dist.flow.config import RunConfig
from qe_dist.flow.source import open_source
from qe_dist.io.run_dir import RunDir
from qe_dist.io.spool import Spool

CHARACTERS_PER_TOKEN = 2  # English has about four, other languages fewer
TEMPLATE_TOKENS = 64


def make_batches(run: RunConfig) -> list[list[Sample]]:
    """The samples in their order, `samples_per_batch` at a time."""
    samples = read_samples(run.calibration)
    size = run.samples_per_batch
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def batch_tokens(batches: Sequence[Sequence[Sample]], pixels_per_token: int) -> int:
    """Estimates the tokens of the largest batch, padding included, without tokenizing: enough to plan memory."""
    return max(len(batch) * max(_tokens(sample, pixels_per_token) for sample in batch) for batch in batches)


def _tokens(sample: Sample, pixels_per_token: int) -> int:
    said = [part.get("text", "") for message in sample.messages for part in message["content"]]
    pixels = sum(width * height for width, height in (image.size for image in sample.images))
    characters = len(sample.text or "") + sum(map(len, said))
    return TEMPLATE_TOKENS + characters // CHARACTERS_PER_TOKEN + pixels // pixels_per_token


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
