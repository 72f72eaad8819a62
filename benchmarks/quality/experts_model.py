"""A model for the experiment about experts: statistics and held-out inputs of every block, gathered once and kept.

Statistics are those of the library (`flow.stage`). Held-out tokens are of the development set, in full precision.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qe_dist import archs
from qe_dist.checkpoint.evaluate import places
from qe_dist.core.batch import PADDING, Batch
from qe_dist.core.sample import Example, Sample
from qe_dist.data.samples import load_images, read_samples
from qe_dist.flow.config import RunConfig
from qe_dist.flow.plan import StagePlan
from qe_dist.flow.source import open_source
from qe_dist.flow.stage import Stage
from qe_dist.methods.base import GroupProblem

HELD_OUT = 1024
"""Tokens of the development set on which the error of a group is measured."""


@dataclass(frozen=True)
class HeldOut:
    """Inputs of a group that took no part in its fit, and the tokens they belong to."""

    x: Tensor
    keys: Tensor
    modality: Tensor
    sample: Tensor
    position: Tensor


@dataclass(frozen=True)
class BlockData:
    problems: Mapping[str, GroupProblem]
    """Of every group; its router reads what the architecture says, the input of its sublayer."""
    held_out: Mapping[str, HeldOut]


@dataclass(frozen=True)
class Part:
    """One of the sets that predictions are measured on."""

    batches: list[Batch]
    """As they enter the first block."""
    examples: list[list[Example]]
    final: list[Tensor]
    """Behind the last norm of the full-precision model, where something is predicted; of each sample. [P, D]"""

    @property
    def ordered(self) -> list[Example]:
        return [e for batch in self.examples for e in batch]


class Prepared:
    """The folder that `prepare` fills."""

    def __init__(self, run: RunConfig) -> None:
        self.folder = Path(run.output)
        self.source = open_source(run)
        self.arch = archs.for_config(self.source.config)
        self.spec = self.arch.spec(self.source)
        self.norm = self.arch.last_norm(self.source, "cpu", torch.float32)
        self.head = self.source.get(self.arch.head(self.source)).float()

    def block(self, index: int) -> BlockData:
        return torch.load(self.folder / f"block-{index:02}.pt", weights_only=False)

    def part(self, name: str) -> Part:
        return torch.load(self.folder / f"{name}.pt", weights_only=False)

    def module(self, index: int) -> torch.nn.Module:
        return self.arch.block(self.source, self.spec.blocks[index], "cpu", torch.float32)

    def predicting(self, hidden: Tensor, examples: Sequence[Example]) -> list[Tensor]:
        """What the last norm makes of the last block's output [B, L, D], where something is predicted. [P, D] each"""
        hidden = self.norm(hidden)
        return [hidden[row][places(e)] for row, e in enumerate(examples)]


def prepare(run: RunConfig, sets: Mapping[str, tuple[Path, int]], calibration: int) -> Prepared:
    """Runs all samples through the model, block by block, and keeps what the rows need in `run.output`.

    sets: file and number of samples of each part; held-out tokens are of `development`. Ends at once where it is done.
    """
    done = Prepared(run)
    if (run.output / "ready").exists():
        return done
    shutil.rmtree(run.output, ignore_errors=True)
    run.output.mkdir(parents=True)
    arch, spec = done.arch, done.spec
    encoder, prelude = arch.encoder(run.model), arch.prelude(done.source, "cpu", torch.float32)

    def embedded(path: Path, count: int) -> Iterator[tuple[Batch, list[Example]]]:
        samples = spread(read_samples(path), count)
        examples = sorted((encoder(s, load_images(s)) for s in samples), key=lambda e: e.input_ids.numel())
        for i in range(0, len(examples), run.samples_per_batch):
            part = examples[i : i + run.samples_per_batch]
            yield prelude(part, i // run.samples_per_batch), part

    calibrating = [batch for batch, _ in embedded(run.calibration, calibration)]
    parts = {name: list(embedded(path, count)) for name, (path, count) in sets.items()}
    streams = {name: [batch for batch, _ in found] for name, found in parts.items()}
    stage = Stage([run], spec.arch)
    for block in spec.blocks:
        stage.load(StagePlan(0, (block,)))
        calibrating = [stage.forward(batch) for batch in calibrating]
        problems = {job.group: stage.problem(job) for job in stage.jobs()}
        caught = _Caught(stage.blocks[block.index].module, block)
        for name, batches in streams.items():
            streams[name] = [
                replace(caught.forward(stage, b, keep=name == "development"), index=b.index) for b in batches
            ]
        torch.save(BlockData(problems, caught.sampled()), run.output / f"block-{block.index:02}.pt")
        print(f"block {block.index} is prepared", flush=True)
    for name, found in parts.items():
        final = [
            one
            for batch, (_, examples) in zip(streams[name], found, strict=True)
            for one in done.predicting(batch.hidden, examples)
        ]
        torch.save(Part([b for b, _ in found], [e for _, e in found], final), run.output / f"{name}.pt")
    (run.output / "ready").touch()
    return done


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """So many samples, of each kind its share, evenly spaced among those of the kind. (Evenly spaced among all of them
    would be of one kind where kinds take turns.)"""
    kinds: dict[str, list[Sample]] = {}
    for sample in samples:
        kinds.setdefault(sample.kind, []).append(sample)
    ends = list(accumulate(len(own) * count / len(samples) for own in kinds.values()))
    shares = [round(end) - round(before) for before, end in pairwise([0.0, *ends])]
    return [own[i * len(own) // share] for own, share in zip(kinds.values(), shares, strict=True) for i in range(share)]


class _Caught:
    """Inputs of the groups of a block."""

    def __init__(self, module: torch.nn.Module, block: Any) -> None:
        self.found: dict[str, list[Tensor]] = {group.name: [] for group in block.groups}
        self.tokens: list[tuple[Tensor, ...]] = []
        self.rows: Tensor | None = None
        for group in block.groups:
            module.get_submodule(group.linears[0].name).register_forward_pre_hook(self._hook(group.name))

    def _hook(self, name: str):
        def catch(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.rows is not None:
                self.found[name].append(args[0][self.rows])

        return catch

    def forward(self, stage: Stage, batch: Batch, keep: bool) -> Batch:
        if keep:
            self.rows = batch.modality != PADDING
            sample = batch.sample_ids[:, None].expand_as(batch.modality)
            position = torch.arange(batch.modality.shape[1]).expand_as(batch.modality)
            facts = (batch.token_keys(), batch.modality, sample, position)
            self.tokens.append(tuple(t[self.rows] for t in facts))
        after = stage.forward(replace(batch, index=0))  # counted long ago: only forwarded
        self.rows = None
        return after

    def sampled(self) -> dict[str, HeldOut]:
        """The first HELD_OUT tokens of whole samples in a fixed order, so that neighbours stay neighbours."""
        keys, modality, sample, position = (torch.cat(t) for t in zip(*self.tokens, strict=True))
        chosen = []
        for one in sample.unique()[torch.randperm(len(sample.unique()), generator=torch.Generator().manual_seed(0))]:
            chosen.append((sample == one).nonzero().squeeze(1))
            if sum(map(len, chosen)) >= HELD_OUT:
                break
        rows = torch.cat(chosen)[:HELD_OUT]
        facts = [t[rows] for t in (keys, modality, sample, position)]
        return {name: HeldOut(torch.cat(found)[rows], *facts) for name, found in self.found.items()}
