"""Evaluation out of core: a model larger than memory, block by block, with the embed stage and the spool of a run."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qe_dist.archs.base import BlockLoader, Family
from qe_dist.checkpoint.encoded import lengths_of
from qe_dist.checkpoint.evaluate import batches, places
from qe_dist.core.machine import give_back_memory
from qe_dist.core.sample import Example
from qe_dist.core.source import WeightSource
from qe_dist.io.run_dir import RunDir
from qe_dist.io.spool import Spool, Spooled
from qe_dist.numerics.prediction import Head


@dataclass(frozen=True)
class StreamedModel:
    """Holds the embeddings and the vision tower, or one block, or the head; never the model.

    loaders: of its blocks. work: a folder for the hidden states between two blocks, of all samples, twice at most.
    """

    arch: Family
    source: WeightSource
    loaders: Sequence[BlockLoader]
    work: Path
    device: str
    dtype: torch.dtype

    @property
    def head(self) -> Head:
        """The head of the model; on a CPU it is a map of its file."""
        return Head.of(self.source.get(self.arch.head(self.source)).to(self.device))

    def states(self, examples: Sequence[Example], tokens: int) -> Iterator[list[tuple[Example, Tensor]]]:
        store = RunDir(self.work)
        with closing(Spool(store)) as spool:
            read = self._embedded(spool, examples, tokens)
            for index, load in enumerate(self.loaders):
                run = load()
                for i in range(len(read)):
                    batch = spool.get(Spooled(index, i))
                    spool.put(index + 1, self.arch.passed_on(batch.with_hidden(run(batch).cpu()), index))
                spool.flush()
                store.drop_batches_before(index + 1)
                del run
                give_back_memory()
            norm = self.arch.last_norm(self.source, self.device, self.dtype)
            for i, part in enumerate(read):
                hidden = spool.get(Spooled(len(self.loaders), i)).hidden
                rows = [hidden[row][places(one)] for row, one in enumerate(part)]
                with torch.no_grad():
                    yield [(one, norm(own.to(self.device, self.dtype))) for one, own in zip(part, rows, strict=True)]
        store.drop_batches_before(len(self.loaders) + 1)

    def _embedded(self, spool: Spool, examples: Sequence[Example], tokens: int) -> list[list[Example]]:
        """Spools what enters the first block. Returns the samples of each batch, without their images."""
        prelude = self.arch.prelude(self.source, self.device, self.dtype)
        read: list[list[Example]] = []
        for index, chosen in enumerate(batches(lengths_of(examples), tokens)):
            part = [examples[i] for i in chosen]
            spool.put(0, prelude(part, index))
            read.append([replace(one, vision={}) for one in part])
        spool.flush()
        return read
