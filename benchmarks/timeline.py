"""How long a run takes: its schedule as a graph of tasks, played forward. Pure; seconds in, seconds out.

Workers hold consecutive blocks; a wave loads them, streams every batch through the workers as a pipeline, then fits.
Tasks of one place (a worker, the embedder, a disk) run one after another in the order in which they were added.
"""

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True)
class Costs:
    """Seconds of each step, on a core or device that nothing else uses."""

    startup: float
    """Until the first weights are read."""
    load: float
    """Of one block, by its worker."""
    forward: float
    """Of one batch through one block, statistics included."""
    fit: tuple[float, ...]
    """Of one block, by its groups."""
    embed: float = 0.0
    """Of one batch: vision tower, embeddings, spooling."""
    transfer: float = 0.0
    """Of one batch from a worker (or the embedder) to the next, time of the receiver."""
    spool_write: float = 0.0
    """Of one batch, behind the last worker of a wave."""
    spool_read: float = 0.0
    """Of one batch, ahead of the first worker of a wave."""
    read: float = 0.0
    """Of one block, from storage into the page cache of its node, before `load`."""
    finish: float = 0.0
    """After the last fit: index, renames, shutdown."""


@dataclass(frozen=True)
class Work:
    """What is done, by whom."""

    waves: tuple[tuple[int, ...], ...]
    """Number of blocks of every worker that has some, for each wave."""
    batches: int
    workers: int
    in_flight: int = 2
    """Batches on their way at the same time, for each worker of a wave."""
    embed_ahead: bool = False
    """On GPUs: the embedder lends the first worker's device and is done before the first wave."""
    nodes: int = 1
    """Each reads with its own storage."""
    cores: float = math.inf
    """Shared in equal parts by whatever runs; infinite where every place has a device of its own."""


def even_waves(blocks: int, workers: int, each: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Blocks of every worker in as few waves as go with at most `each` per worker, all as equal as can be."""
    room = workers * (each or blocks)
    waves = _parts(blocks, -(-blocks // room))
    return tuple(tuple(count for count in _parts(size, workers) if count) for size in waves)


def _parts(count: int, parts: int) -> list[int]:
    return [count // parts + (index < count % parts) for index in range(parts)]


@dataclass(frozen=True)
class Task:
    part: str
    place: tuple[str, int]
    seconds: float
    after: tuple[int, ...]
    """Indices of tasks that must have ended, the one before it at the same place among them."""


@dataclass(frozen=True)
class Timeline:
    seconds: float
    path: Mapping[str, float]
    """Seconds by part along the critical path: the chain of tasks without a gap that ends last."""
    utilisation: float
    """Share of all workers' time in which they forward or fit."""


def predict(costs: Costs, work: Work) -> Timeline:
    """The schedule of `flow.local.quantize` on workers, as the cluster's driver runs it."""
    tasks = _graph(costs, work)
    spans = play(tasks, work.cores)
    seconds = max(end for _, end in spans)
    useful = sum(t.seconds for t in tasks if t.part in ("forward", "fit"))
    return Timeline(seconds, _critical_path(tasks, spans), useful / (work.workers * seconds) if seconds else 0.0)


def play(tasks: Sequence[Task], cores: float = math.inf) -> list[tuple[float, float]]:
    """(start, end) of every task, each begun as soon as it may, in seconds.

    Whatever runs shares the cores equally, so one clock that slows down serves all tasks: on it, a task takes exactly
    its seconds, and the next end is that of the smallest reading.
    """
    waits = [len(task.after) for task in tasks]
    followers: list[list[int]] = [[] for _ in tasks]
    for index, task in enumerate(tasks):
        for before in task.after:
            followers[before].append(index)
    spans = [(0.0, 0.0)] * len(tasks)
    now = clock = 0.0
    running: list[tuple[float, int]] = []
    ready = [index for index, count in enumerate(waits) if not count]
    while ready or running:
        for index in ready:
            spans[index] = (now, now)
            heapq.heappush(running, (clock + tasks[index].seconds, index))
        slowdown = max(1.0, len(running) / cores)
        reading, index = heapq.heappop(running)
        now, clock = now + (reading - clock) * slowdown, reading
        spans[index] = (spans[index][0], now)
        ready = []
        for follower in followers[index]:
            waits[follower] -= 1
            if not waits[follower]:
                ready.append(follower)
    return spans


def spread(costs: Sequence[float], workers: int) -> list[list[float]]:
    """Longest first, each to the worker with the least so far: at most a third above the best that there is."""
    bins: list[tuple[float, int, list[float]]] = [(0.0, index, []) for index in range(workers)]
    for cost in sorted(costs, reverse=True):
        total, index, held = heapq.heappop(bins)
        heapq.heappush(bins, (total + cost, index, [*held, cost]))
    return [held for _, _, held in sorted(bins, key=lambda b: b[1])]


@dataclass
class _Graph:
    tasks: list[Task] = field(default_factory=list)
    last: dict[tuple[str, int], int] = field(default_factory=dict)

    def add(self, part: str, place: tuple[str, int], seconds: float, *after: int) -> int:
        before = {self.last[place]} if place in self.last else set()
        self.tasks.append(Task(part, place, seconds, tuple(before.union(after))))
        self.last[place] = len(self.tasks) - 1
        return self.last[place]


def _graph(costs: Costs, work: Work) -> list[Task]:
    graph = _Graph()
    ready = [graph.add("start-up", ("driver", 0), costs.startup)]
    if work.embed_ahead:
        ready = [graph.add("embed", ("worker", 0), work.batches * costs.embed, *ready)]
    reading = ready
    for number, wave in enumerate(work.waves):
        spooled = number > 0 or work.embed_ahead
        source = ("spool read", costs.spool_read) if spooled else ("embed", costs.embed)
        loaded = _load(graph, costs, work, wave, ready, reading)
        streamed = _stream(graph, costs, work, wave, source, loaded, number < len(work.waves) - 1)
        ready, reading = _fit(graph, costs, work, wave, streamed), streamed
    graph.add("finish", ("driver", 0), costs.finish, *ready)
    return graph.tasks


def _load(graph: _Graph, costs: Costs, work: Work, wave: Sequence[int], ready: list[int], reading: list[int]):
    """The page cache of each node fills from `reading` on, while the wave before is still being fitted."""
    tasks = []
    for worker, blocks in enumerate(wave):
        disk = ("disk", worker * work.nodes // work.workers)
        read = graph.add("read", disk, blocks * costs.read, *reading)
        tasks.append(graph.add("load", ("worker", worker), blocks * costs.load, read, *ready))
    return tasks


def _stream(
    graph: _Graph,
    costs: Costs,
    work: Work,
    wave: Sequence[int],
    source: tuple[str, float],
    loaded: list[int],
    spool: bool,
) -> list[int]:
    part, seconds = source
    landed: list[int] = []
    for index in range(work.batches):
        bound = index - work.in_flight * len(wave)
        batch = graph.add(part, ("embedder", 0), seconds, *(loaded if bound < 0 else [landed[bound]]))
        for worker, blocks in enumerate(wave):
            graph.add("transfer", ("worker", worker), costs.transfer, batch)
            batch = graph.add("forward", ("worker", worker), blocks * costs.forward)
        landed.append(batch)
        if spool:
            batch = graph.add("spool write", ("spool", 0), costs.spool_write, batch)
    return [landed[-1], batch]


def _fit(graph: _Graph, costs: Costs, work: Work, wave: Sequence[int], streamed: list[int]) -> list[int]:
    """All groups of the wave, balanced over all workers."""
    shares = spread(sum(wave) * costs.fit, work.workers)
    return [graph.add("fit", ("worker", worker), sum(share), *streamed) for worker, share in enumerate(shares)]


def _critical_path(tasks: Sequence[Task], spans: Sequence[tuple[float, float]]) -> Mapping[str, float]:
    chain = [max(range(len(tasks)), key=lambda i: spans[i][1])]
    while tasks[chain[-1]].after:
        chain.append(max(tasks[chain[-1]].after, key=lambda i: spans[i][1]))
    path: Counter[str] = Counter()
    for later, earlier in pairwise([*chain, None]):
        path[tasks[later].part] += spans[later][1] - (0.0 if earlier is None else spans[earlier][1])
    return dict(path)
