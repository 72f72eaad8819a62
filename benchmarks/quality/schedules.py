"""What running the tuning of blocks in parallel costs in accuracy: KL of the real language model under each schedule.

    make real
    OMP_NUM_THREADS=1 python benchmarks/quality/schedules.py      writes benchmarks/results/schedules.json

The first blocks of SmolLM2-135M are tuned as `rtn+tune` does, the others stay in full precision. Every schedule
makes the same steps on the same texts with the same draws. What differs is on which inputs a block is tuned, and so how
many blocks can be tuned at once. Each row is written as soon as it is measured, and is not measured again.

sequential          what the quantized blocks before make of the calibration; targets from the full-precision model
pipelined M         the same in M parts: a block makes each part on what the block before makes after that part
waves W             of W blocks: inputs are quantized up to where the wave begins, and in full precision within it
independent         inputs in full precision
own targets         inputs from the blocks rounded to nearest; targets: the full-precision block on these inputs
damped              the same, and of the error that is inherited a share 1 / (number of the block) is corrected
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from qe_pipelines.evaluate import encode
from qe_pipelines.results import write_result
from torch import Tensor

from qe_dist.core.batch import PADDING, joined
from qe_dist.core.quantized import QuantizedGroup
from qe_dist.flow.calibrate import Embedder
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import Prepared, prepare_run
from qe_dist.flow.plan import StagePlan
from qe_dist.flow.stage import Stage
from qe_dist.flow.tuning import with_groups
from qe_dist.methods.block import BlockProblem, TunedBlock
from qe_dist.methods.recipes import load_recipe
from qe_dist.methods.tuning.tune import Tune
from qe_dist.numerics.grid import dequantize
from qe_dist.numerics.tuned_linear import FrozenGroup
from qe_dist.serve.loading import load_model

ROOT = Path(__file__).parents[2]
REAL, RESULT = ROOT / "real", ROOT / "benchmarks" / "results" / "schedules.json"
PARTS, WAVES = (2, 4, 8), (2, 4)
Groups = Mapping[str, QuantizedGroup]


@dataclass
class Seconds:
    """Of the processor: of training, and of passing the calibration through a block."""

    train: float = 0.0
    forward: float = 0.0


class Blocks:
    """The first blocks of the model, their closed forms, and what goes in and out of each in full precision."""

    def __init__(self, ready: Prepared, count: int) -> None:
        run, model = ready.config, ready.model
        self.run, self.seconds = run, Seconds()
        with closing(Stage((run,), model.arch)) as stage, closing(Embedder(run, model.arch)) as embedder:
            below = ready.task.held_out_below
            stage.load(StagePlan(0, model.blocks[:count], False, below, len(model.blocks), len(ready.samples)))
            batches = [embedder.embed(i, samples) for i, samples in enumerate(ready.samples)]
            for batch in batches:
                stage.forward(batch)
            self.blocks = list(stage.blocks.values())
            self.views = [block.view(run) for block in self.blocks]
            self.arch, self.batch = stage.arch, joined(batches)
            self.problems = [block.problems(run) for block in self.blocks]
            self.closed = [
                {job.group: self._fitted(stage, job) for job in stage.jobs() if job.block == i} for i in range(count)
            ]
        self.held_out = self.batch.held_out(below)[:, 0]
        self.exact = [self.batch.hidden]
        for i in range(count):
            self.exact.append(self.through(i, self.exact[-1], None))

    @staticmethod
    def _fitted(stage: Stage, job: Any) -> QuantizedGroup:
        stage.draft(job)
        return stage.settle(job, None)

    @torch.no_grad()
    def through(self, index: int, hidden: Tensor, groups: Groups | None) -> Tensor:
        """What a block makes of inputs; None: in full precision."""
        start, block = time.process_time(), self.blocks[index].module
        if groups is not None:
            block = with_groups(block, self.views[index], {n: FrozenGroup(g) for n, g in groups.items()})
        out = self.arch.run_block(block, self.batch.with_hidden(hidden), index)
        self.seconds.forward += time.process_time() - start
        return out

    def tuned(self, index: int, inputs: Tensor, targets: Tensor, **where: Any) -> TunedBlock:
        """A block after a part of its steps."""
        batch, module, view = self.batch.with_hidden(inputs), self.blocks[index].module, self.views[index]

        def place(groups: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
            block = with_groups(module, view, groups)
            return lambda rows: self.arch.decoder.run(block, batch.take(rows), index)

        problem = BlockProblem(
            self.closed[index], self.problems[index], 4, place, targets, batch.modality != PADDING, self.held_out,
            self.run.seed + 1000 * index, **where,
        )  # fmt: skip
        tuner, start = self.run.recipe.tuning, time.process_time()
        assert tuner is not None
        found = tuner.tune(problem)
        self.seconds.train += time.process_time() - start
        return found


# -- schedules: each returns the groups of every block


def pipelined(blocks: Blocks, parts: int) -> list[Groups]:
    """In so many parts; 1: sequential."""
    steps = blocks.run.recipe.tuning.steps
    inputs, done = [blocks.exact[0]] * parts, []
    for i in range(len(blocks.blocks)):
        training, after = None, []
        for part in range(parts):
            made = range(steps * part // parts, steps * (part + 1) // parts)
            tuned = blocks.tuned(i, inputs[part], blocks.exact[i + 1], part=made, training=training)
            training = tuned.training
            after.append(blocks.through(i, inputs[part], tuned.groups))
        inputs = after
        done.append(tuned.groups)
    return done


def waves(blocks: Blocks, width: int) -> list[Groups]:
    quantized, done = blocks.exact[0], []
    for begin in range(0, len(blocks.blocks), width):
        inputs, wave = quantized, range(begin, min(begin + width, len(blocks.blocks)))
        for i in wave:
            done.append(blocks.tuned(i, inputs, blocks.exact[i + 1]).groups)
            inputs = blocks.through(i, inputs, None)
        for i in wave:
            quantized = blocks.through(i, quantized, done[i])
    return done


def independent(blocks: Blocks) -> list[Groups]:
    return [blocks.tuned(i, blocks.exact[i], blocks.exact[i + 1]).groups for i in range(len(blocks.blocks))]


def own_targets(blocks: Blocks, corrected: Callable[[int], float]) -> list[Groups]:
    """corrected: share of the inherited error that a block is to correct."""
    inputs, done = blocks.exact[0], []
    for i in range(len(blocks.blocks)):
        own = blocks.through(i, inputs, None)
        targets = own + corrected(i) * (blocks.exact[i + 1] - own)
        done.append(blocks.tuned(i, inputs, targets).groups)
        inputs = blocks.through(i, inputs, blocks.closed[i])
    return done


SCHEDULES: dict[str, Callable[[Blocks], list[Groups]]] = {
    "RTN": lambda b: list(b.closed),
    "sequential": lambda b: pipelined(b, 1),
    **{f"pipelined {n}": lambda b, n=n: pipelined(b, n) for n in PARTS},
    **{f"waves {n}": lambda b, n=n: waves(b, n) for n in WAVES},
    "independent": independent,
    "own targets": lambda b: own_targets(b, lambda _: 0.0),
    "damped": lambda b: own_targets(b, lambda i: 1 / (i + 1)),
}

# -- what they cost


class Measured:
    """The model with some blocks in the place of its own, on development texts."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.model = load_model(folder)
        arch, self.examples = encode(folder, data)
        self.arch = arch
        self.layers = self.model.get_submodule("model.language_model.layers")
        self.reference = [self._logits(i) for i in range(len(self.examples))]

    @torch.no_grad()
    def _logits(self, index: int) -> Tensor:
        given = self.arch.frontend.model_inputs([self.examples[index]], 0)
        return self.model(**given, use_cache=False).logits[0].log_softmax(-1)

    @torch.no_grad()
    def kl(self, groups: Sequence[Groups]) -> list[float]:
        """Of each text, summed over its tokens. Products are in 16 bits, so the groups are their weights."""
        linears = [
            (self.layers[i].get_parameter(f"{name}.weight"), dequantize(one.codes, one.scale))
            for i, block in enumerate(groups) for group in block.values() for name, one in group.linears.items()
        ]  # fmt: skip
        kept = [weight.clone() for weight, _ in linears]
        for weight, rounded in linears:
            weight.copy_(rounded)
        found = [
            float((exact.exp() * (exact - self._logits(i))).sum()) for i, exact in enumerate(self.reference)
        ]  # fmt: skip
        for (weight, _), before in zip(linears, kept, strict=True):
            weight.copy_(before)
        return found

    @property
    def tokens(self) -> list[int]:
        return [len(exact) for exact in self.reference]


def beginnings(path: Path, count: int, letters: int, place: Path) -> Path:
    """The beginnings of the first texts, in a file of their own."""
    texts = [json.loads(line)["text"][:letters] for line in path.read_text().splitlines()[:count]]
    place.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return place


def main(
    count: Annotated[int, typer.Option(help="blocks")] = 10,
    steps: Annotated[int, typer.Option(help="of a block, of 8 texts each")] = 32,
    texts: Annotated[int, typer.Option(help="calibration texts")] = 96,
    letters: Annotated[int, typer.Option(help="of each text at most")] = 480,
    seeds: Annotated[int, typer.Option(help="runs of each schedule")] = 2,
    recipe: Annotated[str, typer.Option(help="of 16-bit products, without factors")] = "rtn+tune-w4a16g64",
    schedules: Annotated[str, typer.Option(help="comma-separated")] = ",".join(SCHEDULES),
) -> None:
    """Tunes and measures what the result does not hold yet."""
    torch.set_num_threads(1)
    settings = {"model": "SmolLM2-135M", "blocks": count, "steps": steps, "texts": texts, "letters": letters}
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    rows = result.get("rows", [])
    data = REAL / "data"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        measured = Measured(REAL / "lm", beginnings(data / "text-development.jsonl", 48, letters, folder / "d.jsonl"))
        chosen = beginnings(data / "text-calibration.jsonl", texts, letters, folder / "c.jsonl")
        for seed in range(seeds):
            asked = replace(load_recipe(recipe), tuning=Tune(steps=steps))
            run = RunConfig(REAL / "lm", asked, chosen, folder / f"seed-{seed}", seed=seed)
            blocks = Blocks(prepare_run(run), count)
            for name in schedules.split(","):
                if any((row["schedule"], row["seed"], row["recipe"]) == (name, seed, recipe) for row in rows):
                    continue
                blocks.seconds = Seconds()
                groups = SCHEDULES[name](blocks)
                kept = sum(own is not closed for own, closed in zip(groups, blocks.closed, strict=True))
                row = {"schedule": name, "seed": seed, "recipe": recipe, "tuned": kept}
                rows.append(row | {"seconds": vars(blocks.seconds), "kl": measured.kl(groups)})
                print(row, sum(rows[-1]["kl"]) / sum(measured.tokens), blocks.seconds, flush=True)
                write_result(RESULT, settings | {"tokens": measured.tokens, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
