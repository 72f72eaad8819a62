"""Do routed experts pay? One adapter, a shared expert alone, and Quant Experts with every kind of router.

    python benchmarks/quality/experts.py lm         rows of the language model; those that are there already stay
    python benchmarks/quality/experts.py vlm        of the model with a vision tower
    python benchmarks/quality/experts.py layers     held-out errors of single groups of every other block, all models
    python benchmarks/quality/experts.py channels   which channels matter for which token, of what is prepared
    python benchmarks/quality/experts.py lists      lists of channels by class of tokens, of the same
    python benchmarks/quality/experts.py plot       docs/results/experts.png

Writes benchmarks/results/experts.json and experts_channels.json, each row as it is measured. A row quantizes every
block from the statistics of one pass, and runs development and test set through it, each row on its own activations.
Rows of a number format share transform, quantizer and samples, and differ in their repair alone; ranks are as stated on
every layer, however narrow. KL is that of the full-precision model, summed over each sample.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from experts_model import BlockData, Part, Prepared, prepare
from experts_runtime import Block, Group, Routing, Weight
from qe_pipelines.results import environment
from torch import Tensor

from qe_dist.checkpoint.evaluate import places
from qe_dist.core.batch import IMAGE
from qe_dist.core.cost import cost_of
from qe_dist.core.quantized import QuantizedGroup
from qe_dist.core.scheme import Scheme
from qe_dist.core.spec import BlockSpec
from qe_dist.flow.config import RunConfig
from qe_dist.methods.base import Budget, Codes, Compensation, GroupProblem, Quantizer, RoutesTokens
from qe_dist.methods.compensation.aser import ASER
from qe_dist.methods.compensation.lqer import LQER
from qe_dist.methods.compensation.none import NoCompensation
from qe_dist.methods.compensation.qera import QERA
from qe_dist.methods.compensation.quant_experts import QuantExperts
from qe_dist.methods.quantizers.gptq import GPTQ
from qe_dist.methods.quantizers.rtn import RoundToNearest
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.store import stored
from qe_dist.methods.transforms.outlier_smoothing import OutlierSmoothing
from qe_dist.numerics.stats import GroupStats, Needs

ROOT = Path(__file__).parents[2]
REAL, RESULTS = ROOT / "real", ROOT / "benchmarks" / "results"
MODELS = {"lm": "text-", "vlm": ""}
"""And how the names of their data begin."""
CALIBRATION, SETS = 64, {"lm": {"development": 10, "test": 32}, "vlm": {"development": 32, "test": 96}}
"""Samples. Two thirds of the VLM's have a picture, and an answer of one or two tokens."""
SAMPLE_TOKENS = 4096
RANK, HALF, EQUAL_BYTES = 64, 32, 288
"""Of one adapter; of the shared and of each routed expert; of one adapter as large as a shared expert and 8 others."""
SCORES = ("kl", "nll", "agrees")
"""Of a token: KL(full precision || row), -log of its likelihood, whether both think the same token the most likely."""
TOKENS_AT_ONCE = 512
"""Of which logits are made."""
FORMATS = ("w4a6", "w3a16g64", "w4a8", "w4a4")
QUANTIZERS: Mapping[str, Quantizer] = {"gptq": GPTQ(), "rtn": RoundToNearest()}


class RandomClusters(QuantExperts):
    """Quant Experts whose routed channels are dealt out by lot; routers are fitted as always."""

    def clusters(self, occurs: Tensor, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randperm(occurs.shape[1], generator=draw) % self.num_experts


@dataclass(frozen=True)
class Repair:
    """What a row does about rounding."""

    compensation: Compensation
    rank: int
    routing: Routing = "router"


OWN, SUBLAYER = QuantExperts(router_input="own"), QuantExperts()
REPAIRS: Mapping[str, Repair] = {
    "qera 64": Repair(QERA(), RANK),
    "shared 64": Repair(ASER(rank_by="frequency"), RANK),
    "qe own": Repair(OWN, RANK),
    "qe sublayer": Repair(SUBLAYER, RANK),
    "qe random routing": Repair(OWN, RANK, "random"),
    "qe oracle": Repair(OWN, RANK, "oracle"),
    "shared 288": Repair(ASER(rank_by="frequency"), EQUAL_BYTES),
    "qera 288": Repair(QERA(), EQUAL_BYTES),
    "shared 32": Repair(ASER(rank_by="frequency"), HALF),
    "qe random clusters": Repair(RandomClusters(router_input="own"), RANK),
    "qe own, all columns rounded": Repair(replace(OWN, exempt_columns=False), RANK),
    "lqer 64": Repair(LQER("identity"), RANK),
    "aser 64": Repair(ASER(rank_by="mean"), RANK),
    "none": Repair(NoCompensation(), RANK),
}
"""shared N: the shared expert alone, of rank N; exempted columns and all, as ASER has it."""
FIRST = ("qera 64", "shared 64", "qe own", "qe random routing", "qe oracle")
SECOND = ("qe sublayer", "shared 288", "qera 288")
REST = tuple(name for name in REPAIRS if name not in FIRST + SECOND)
LAYERS = ("shared 64", "qe own", "qe random routing", "qe oracle", "shared 288")
NARROW = ("qera 64", "qe own, all columns rounded", "qera 288", "none")
"""With 4-bit factors, which cannot hold whole columns."""
AGAIN = ("qe own", "qe sublayer", "qe random clusters", "qe random routing")
"""With the other seed, which decides nothing else."""


@dataclass(frozen=True)
class Row:
    name: str
    scheme: str
    quantizer: str = "gptq"
    factor_bits: int = 16
    seed: int = 0

    @property
    def repair(self) -> Repair:
        return REPAIRS[self.name]

    def recipe(self, quantizer: Quantizer) -> Recipe:
        own = self.repair.compensation
        rank_by = own.rank_by if isinstance(own, ASER) else "frequency"  # ASER smooths what it exempts
        budget = Budget(rank=self.repair.rank, factor_bits=self.factor_bits)
        transform = OutlierSmoothing(rank_by=rank_by)
        return Recipe(Scheme.parse(self.scheme), transform, quantizer, self.repair.compensation, budget)


def bundles() -> Iterator[list[Row]]:
    """All rows, the most telling first; those of a bundle are walked through the model together."""
    yield [Row(name, FORMATS[0]) for name in FIRST]
    yield [Row(name, FORMATS[0]) for name in SECOND]
    for scheme in FORMATS[1:]:
        yield [Row(name, scheme) for name in FIRST]
    yield [Row(name, FORMATS[0], factor_bits=4) for name in NARROW]
    for scheme in FORMATS[1:]:
        yield [Row(name, scheme) for name in SECOND]
    for scheme in FORMATS:
        yield [Row(name, scheme, seed=1) for name in AGAIN]
    for scheme in FORMATS[1:]:
        yield [Row(name, scheme, factor_bits=4) for name in NARROW]
    for scheme in FORMATS:
        yield [Row(name, scheme) for name in REST]
    for scheme in FORMATS:
        yield [Row(name, scheme, quantizer="rtn") for name in FIRST]


class Remembered:
    """A quantizer that rounds the same weight once: rows differ in their repair."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer, self.known = quantizer, {}

    def needs(self) -> Needs:
        return self.quantizer.needs()

    def fit(self, weight: Tensor, stats: GroupStats, scheme: Scheme) -> Codes:
        key = hashlib.sha1(weight.numpy().tobytes()).digest()
        if key not in self.known:
            self.known[key] = self.quantizer.fit(weight, stats, scheme)
        return self.known[key]


@dataclass
class Walk:
    """A row on its way through the model."""

    row: Row
    hidden: dict[str, list[Tensor]]
    """Of each set's batches, before the next block."""
    stored: int = 0
    active: int = 0
    macs: int = 0
    errors: dict[str, list[float]] = field(default_factory=dict)
    """Of each group on held-out tokens, relative to the output, by block."""
    ranks: set[int] = field(default_factory=set)
    fallbacks: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"fit": 0.0, "run": 0.0})


def measure(model: Prepared, rows: Sequence[Row], parts: Mapping[str, Part]) -> list[dict[str, Any]]:
    """Fits rows of one number format and quantizer and runs the sets through them."""
    walks = [Walk(row, {name: [b.hidden for b in part.batches] for name, part in parts.items()}) for row in rows]
    for index, spec in enumerate(model.spec.blocks):
        data, module = model.block(index), model.module(index)
        routes = {g.name: g.router_input for g in spec.groups}
        block = Block(module, {g.name: tuple(x.name for x in g.linears) for g in spec.groups}, routes)
        fitted = Fitted(data, spec, QUANTIZERS[rows[0].quantizer])
        for walk in walks:
            start = time.process_time()
            groups, block.routes = fitted.groups(walk)
            walk.seconds["fit"] += time.process_time() - start
            start = time.process_time()
            for name, part in parts.items():
                for i, batch in enumerate(part.batches):
                    block.use(groups, batch.token_keys())
                    walk.hidden[name][i] = model.arch.run_block(module, batch.with_hidden(walk.hidden[name][i]), index)
            walk.seconds["run"] += time.process_time() - start
        print(f"block {index} of {len(model.spec.blocks)}", flush=True)
    return list(_results(model, walks, parts))


def layers(model: Prepared, index: int, scheme: str) -> dict[str, Any]:
    """Held-out errors of the groups of one block alone: minutes less than a row, and no word about the KL."""
    fitted = Fitted(model.block(index), model.spec.blocks[index], QUANTIZERS["gptq"])
    walks = [Walk(Row(name, scheme), {}) for name in LAYERS]
    for walk in walks:
        fitted.groups(walk)
    errors = {walk.row.name: {group: own[0] for group, own in walk.errors.items()} for walk in walks}
    return {"block": index, "scheme": scheme, "errors": errors}


class Fitted:
    """The groups of one block as rows want them; what rows have in common is made once."""

    def __init__(self, data: BlockData, spec: BlockSpec, quantizer: Quantizer) -> None:
        self.data, self.spec, self.quantizer = data, spec, Remembered(quantizer)
        self.known: dict[Any, tuple[QuantizedGroup, Weight, int]] = {}
        self.weights: dict[bytes, Weight] = {}

    def groups(self, walk: Walk) -> tuple[dict[str, Group], dict[str, str]]:
        """All of them, and the group whose input each one's router reads. Their held-out errors go to the walk."""
        own = _reads_own_input(walk.row.repair.compensation)
        routes = {g.name: g.name if own else g.router_input for g in self.spec.groups}
        groups = {name: self.group(walk, name) for name in routes}
        _hold_out(walk, self.data, groups, routes)
        return groups, routes

    def group(self, walk: Walk, name: str) -> Group:
        row, compensation, read = walk.row, walk.row.repair.compensation, self.spec.group(name).router_input
        if _reads_own_input(compensation):
            if read == name:  # no difference
                compensation = replace(compensation, router_input="sublayer")
            read = name
        problem = _routed(self.data.problems[name], self.data.problems[read])
        key = (row.scheme, row.factor_bits, row.seed, row.repair.rank, type(compensation), compensation, name)
        if key not in self.known:
            draft = row.recipe(self.quantizer).draft(replace(problem, seed=problem.seed + row.seed))
            group = stored(draft.repair.problem, draft.codes, draft.correction, row.factor_bits)
            codes = hashlib.sha1(b"".join(x.codes.numpy().tobytes() for x in group.linears.values())).digest()
            weight = self.weights.setdefault(codes, Weight.of(group))
            self.known[key] = (group, weight, len(draft.fallbacks))
        group, weight, fallbacks = self.known[key]
        cost = cost_of(group)
        walk.stored, walk.active = walk.stored + cost.stored, walk.active + cost.active
        walk.macs += sum(cost.macs.values())
        walk.fallbacks += fallbacks
        if group.input.shared_down is not None:
            walk.ranks.add(group.input.shared_down.shape[0])
        full = torch.cat(list(problem.weights.values())) if row.repair.routing == "oracle" else None
        salt = 4 * self.spec.index + list(self.data.problems).index(name) + 1
        return Group(group, weight, row.repair.routing, full, salt)


def _reads_own_input(compensation: Compensation) -> bool:
    return isinstance(compensation, RoutesTokens) and compensation.router_input == "own"


def _routed(problem: GroupProblem, read: GroupProblem) -> GroupProblem:
    """With a router that reads the input of another group, of which the same tokens are sampled."""
    sample, other = problem.stats.sample, read.stats.sample
    assert torch.equal(sample.keys, other.keys)
    return replace(problem, stats=replace(problem.stats, sample=replace(sample, router_x=other.x)))


def _hold_out(walk: Walk, data: BlockData, groups: Mapping[str, Group], routes: Mapping[str, str]) -> None:
    for name, group in groups.items():
        held = data.held_out[name]
        exact = held.x @ torch.cat(list(data.problems[name].weights.values())).T
        found = group(held.x, data.held_out[routes[name]].x, held.keys)
        error = float(((found - exact).square().sum() / exact.square().sum()).sqrt())
        walk.errors.setdefault(name, []).append(round(error, 5))


def _results(model: Prepared, walks: Sequence[Walk], parts: Mapping[str, Part]) -> Iterator[dict[str, Any]]:
    start, weights = time.process_time(), sum(b.num_weights for b in model.spec.blocks)
    sets = [{} for _ in walks]
    for name, part in parts.items():
        for own, walk in zip(sets, walks, strict=True):
            own[name] = _ends(model, walk.hidden[name], part)
        for own, scores in zip(sets, _scores(model.head, part, [own[name] for own in sets]), strict=True):
            own[name] = scores
    for own, walk in zip(sets, walks, strict=True):
        walk.seconds["score"] = (time.process_time() - start) / len(walks)
        yield {
            **vars(walk.row),
            "ranks": sorted(walk.ranks),
            "stored_bits": round(8 * walk.stored / weights, 4),
            "active_bits": round(8 * walk.active / weights, 4),
            "macs": round(walk.macs / weights, 4),
            "held_out_error": walk.errors,
            "fallbacks": walk.fallbacks,
            "cpu_seconds": {k: round(v, 1) for k, v in walk.seconds.items()},
            "sets": own,
        }


def _ends(model: Prepared, hidden: Sequence[Tensor], part: Part) -> Tensor:
    """What predicts something, behind the last norm, one sample after the other. [P, D]"""
    found = [model.predicting(h, examples) for h, examples in zip(hidden, part.examples, strict=True)]
    return torch.cat([one for batch in found for one in batch])


def _scores(head: Tensor, part: Part, streams: Sequence[Tensor]) -> Iterator[dict[str, list[float]]]:
    """Of each stream [P, D], sums over the tokens of each sample, in the order of `Part.ordered`."""
    exact, sizes = torch.cat(part.final), [len(f) for f in part.final]
    wanted = torch.cat([e.labels[1:][places(e)] for e in part.ordered])
    found = torch.empty(len(streams), len(SCORES), len(wanted))
    for rows in torch.arange(len(wanted)).split(TOKENS_AT_ONCE):
        reference = torch.log_softmax(exact[rows] @ head.T, dim=1)
        likely = reference.exp()
        for one, stream in zip(found, streams, strict=True):
            mine = torch.log_softmax(stream[rows] @ head.T, dim=1)
            agrees = mine.argmax(dim=1) == reference.argmax(dim=1)
            nll = -mine.gather(1, wanted[rows, None]).squeeze(1)
            one[:, rows] = torch.stack([(likely * mine.neg_().add_(reference)).sum(dim=1), nll, agrees])
    for one in found:
        sums = [[float(t.double().sum()) for t in score.split(sizes)] for score in one]
        yield {name: [round(s, 4) for s in own] for name, own in zip(SCORES, sums, strict=True)}


def _prepared(name: str, folder: Path) -> tuple[Prepared, dict[str, tuple[Path, int]]]:
    data = {part: REAL / "data" / f"{MODELS[name]}{part}.jsonl" for part in ("calibration", *SETS[name])}
    run = RunConfig(
        REAL / name,
        Row("qe own", "w4a6").recipe(GPTQ()),
        data["calibration"],
        folder / name,
        sample_tokens=SAMPLE_TOKENS,
    )
    sets = {part: (data[part], count) for part, count in SETS[name].items()}
    return prepare(run, sets, CALIBRATION), sets


def main(
    what: Annotated[str, typer.Argument(help="lm, vlm, layers, channels, lists or plot")],
    work: Annotated[Path, typer.Option(help="directory for what is prepared, some 3 GB a model")] = ROOT / "build",
    only: Annotated[str, typer.Option(help="number formats to run, the others later")] = ",".join(FORMATS),
) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if what in ("channels", "plot", "lists"):
        import experts_channels
        import experts_lists

        prepared = {name: work / name for name in MODELS if (work / name / "ready").exists()}
        experts_lists.main(prepared) if what == "lists" else experts_channels.main(what, prepared)
        return
    if what == "layers":
        _every_layer([name for name in MODELS if (REAL / name).exists()], work, only.split(","))
        return
    path = RESULTS / "experts.json"
    model, _ = _prepared(what, work)
    parts = {name: model.part(name) for name in SETS[what]}
    for bundle in bundles():
        result = json.loads(path.read_text()) if path.exists() else {"models": {}}
        own = result["models"].setdefault(what, {"sets": {n: _facts(p) for n, p in parts.items()}, "rows": []})
        there = [{k: row[k] for k in vars(bundle[0])} for row in own["rows"]]
        rows = [row for row in bundle if vars(row) not in there and row.scheme in only.split(",")]
        if not rows:
            continue
        print(", ".join(row.name for row in rows), rows[0], flush=True)
        own["rows"] += measure(model, rows, parts)
        _write(path, {"environment": environment(), **{k: v for k, v in result.items() if k != "environment"}})


def _every_layer(names: Sequence[str], work: Path, schemes: Sequence[str]) -> None:
    path = RESULTS / "experts_layers.json"
    result = json.loads(path.read_text()) if path.exists() else {"models": {}}
    for name in names:
        model, _ = _prepared(name, work)
        rows = result["models"].setdefault(name, [])
        for index in range(1, len(model.spec.blocks), 2):
            for scheme in schemes:
                if (index, scheme) not in [(row["block"], row["scheme"]) for row in rows]:
                    rows.append(layers(model, index, scheme))
                    _write(path, {"environment": environment(), "models": result["models"]})


def _facts(part: Part) -> dict[str, list[Any]]:
    """Of each sample."""
    return {
        "kind": [e.kind for e in part.ordered],
        "image": [bool((e.modality == IMAGE).any()) for e in part.ordered],
        "tokens": [len(places(e)) for e in part.ordered],
    }


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """A row to a line."""
    shown = json.dumps(content).replace('{"name":', '\n{"name":').replace('{"block":', '\n{"block":')
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(shown + "\n")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(typer.run(main))
