"""The state of a run, computed from the events in its journal, for the command's own view and for `qe-dist status`.

The driver's events and their data:

    start   batches, blocks, done, in_order, first, workers, host, pid, version
            done: blocks that earlier calls finished; in_order: whether blocks wait for each other, to be tuned
    wave    number, first, last, stages: [{worker, node, blocks}]         blocks are loaded, then batches stream
    worker  worker, node, activity, blocks, memory_mib, peak_mib          and its seconds of each activity: load,
            forward, fit, tune
    batch   wave, index, tokens                                           has gone through the wave
    block   the block's report, worker, seconds                           is published
    lost    worker, node, reason, blocks
    again   wave, from_batch                                              the wave is streamed again
    note    text
    stop    reason
    done    seconds

Other events change nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from qe_dist.io.journal import Record


@dataclass(frozen=True)
class Worker:
    """The last report of a worker."""

    node: str
    blocks: tuple[int, ...]
    activity: str = "load"
    memory_mib: float | None = None
    peak_mib: float | None = None


@dataclass(frozen=True)
class Lost:
    """A worker that died."""

    time: str
    worker: int
    node: str
    reason: str


@dataclass(frozen=True)
class Wave:
    """Blocks that workers hold at the same time. Times are seconds since the call began."""

    number: int
    first: int
    last: int
    stages: tuple[tuple[int, ...], ...]
    """The blocks of each worker, which fits them one after another."""
    begun: float
    """When it began, or was last streamed again."""
    opening: str = "load"
    """What comes before its first batch: `load`, or `start` when processes start too, for the first wave or for a
    lost worker."""
    batches: int = 0
    """Number of batches that have passed through."""
    since: float | None = None
    """When the first batch since `begun` had passed through."""
    until: float = 0.0
    """When the last batch had passed through."""
    gaps: int = 0
    """Batches after the first one."""
    tokens: int = 0
    """Tokens of those batches."""

    @property
    def tokens_per_second(self) -> float | None:
        """None before there are two batches to measure between."""
        if self.since is None or not self.gaps or self.until <= self.since:
            return None
        return self.tokens / (self.until - self.since)


@dataclass(frozen=True)
class RunState:
    """A run after some of its events. What concerns one call begins anew when the command is typed again."""

    call: str = ""
    calls: int = 0
    began: str = ""
    """Wall clock when this call began."""
    time: str = ""
    """Wall clock at the last event."""
    elapsed: float = 0.0
    """Seconds of this call at the last event."""
    batches: int = 0
    blocks: int = 0
    before: int = 0
    """Number of blocks that were finished before this call."""
    in_order: bool = False
    """Whether blocks are finished one after another, whatever the number of workers."""
    earlier: frozenset[int] = frozenset()
    """The indices of those blocks, as far as the journal has them."""
    finished: frozenset[int] = frozenset()
    """Blocks that this call finished."""
    wave: Wave | None = None
    workers: Mapping[int, Worker] = field(default_factory=dict)
    end: str | None = None
    """`done` or `stop`; None while the call goes on."""
    reason: str = ""
    """Why it stopped."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Duration of each part of the work, as last measured in any call: of a wave until its first batch has passed
    through (`start` or `load`), of a `batch`, and of the `fit` of a block."""
    lost: tuple[Lost, ...] = ()
    """Workers lost in all calls."""
    fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Steps of the ladder by layer, of all calls."""
    notes: tuple[str, ...] = ()

    @property
    def done(self) -> int:
        """Number of finished blocks."""
        return self.before + len(self.finished)

    @property
    def waves(self) -> int:
        """Number of waves of this call, if the following ones have as many blocks as this one."""
        wave = self.wave
        return 0 if wave is None else wave.number + -(-(self.blocks - 1 - wave.last) // (wave.last - wave.first + 1))

    @property
    def left(self) -> "Left":
        """The time left, at the last event."""
        work = {} if self.end else self._work()
        known = sum(count * self.seconds.get(part, 0.0) for part, count in work.items())
        return Left(known, bool(self.wave) and all(part in self.seconds for part, count in work.items() if count))

    def _work(self) -> dict[str, float]:
        """How often each part of the work (the keys of `seconds`) is still to do, one after another."""
        wave = self.wave
        if wave is None:
            return {}
        later, waiting = self.waves - wave.number, wave.since is None
        unfitted = [len(set(blocks) - self.finished - self.earlier) for blocks in wave.stages]
        unfitted_later = self.blocks - self.done - sum(unfitted)
        at_once = (wave.last - wave.first + 1) / max(map(len, wave.stages))
        return {
            "start": waiting and wave.opening == "start",
            "load": later + (waiting and wave.opening == "load"),
            "batch": later * (self.batches - 1) + self.batches - wave.batches - waiting,
            "fit": sum(unfitted) + unfitted_later if self.in_order else max(unfitted) + unfitted_later / at_once,
        }


@dataclass(frozen=True)
class Left:
    """An estimate of the time left."""

    seconds: float
    whole: bool
    """Whether every part of the work was measured; if not, `seconds` is a lower bound."""


def read_state(records: Iterable[Record], state: RunState | None = None) -> RunState:
    """The state after these records, which follow those that led to `state`."""
    return reduce(step, records, state or RunState())


def step(state: RunState, record: Record) -> RunState:
    """The state after one more record. Unknown events change nothing but the time."""
    if record.call != state.call:
        state = RunState(
            call=record.call,
            calls=state.calls + 1,
            began=record.time,
            batches=state.batches,
            blocks=state.blocks,
            before=state.done,
            earlier=state.earlier | state.finished,
            seconds=state.seconds,
            lost=state.lost,
            fallbacks=state.fallbacks,
        )
    state = replace(state, time=record.time, elapsed=record.elapsed)
    return _STEPS[record.event](state, record.data) if record.event in _STEPS else state


def _start(state: RunState, data: Mapping[str, Any]) -> RunState:
    return replace(
        state,
        batches=data["batches"],
        blocks=data["blocks"],
        before=data["done"],
        in_order=data.get("in_order", False),  # journals of earlier versions
    )


def _wave(state: RunState, data: Mapping[str, Any]) -> RunState:
    parts = {}
    for part in data["stages"]:
        before = state.workers.get(part["worker"], Worker("", ()))
        parts[part["worker"]] = replace(before, node=part["node"], blocks=tuple(part["blocks"]), activity="load")
    wave = Wave(
        number=data["number"],
        first=data["first"],
        last=data["last"],
        stages=tuple(worker.blocks for worker in parts.values()),
        begun=state.elapsed,
        opening="start" if data["number"] == 1 else "load",
    )
    return replace(state, wave=wave, workers=parts)


def _worker(state: RunState, data: Mapping[str, Any]) -> RunState:
    worker = Worker(data["node"], tuple(data["blocks"]), data["activity"], data["memory_mib"], data["peak_mib"])
    return replace(state, workers={**state.workers, data["worker"]: worker})


def _batch(state: RunState, data: Mapping[str, Any]) -> RunState:
    wave, now = state.wave, state.elapsed
    if wave is None:
        return state
    since = wave.since
    if since is None:
        wave = replace(wave, since=now, until=now, batches=data["index"] + 1)
        return replace(state, wave=wave, seconds={**state.seconds, wave.opening: now - wave.begun})
    gaps = wave.gaps + 1
    wave = replace(wave, until=now, batches=data["index"] + 1, gaps=gaps, tokens=wave.tokens + data["tokens"])
    return replace(state, wave=wave, seconds={**state.seconds, "batch": (now - since) / gaps})


def _block(state: RunState, data: Mapping[str, Any]) -> RunState:
    finished, before = state.finished | {data["index"]}, state.seconds.get("fit", 0.0)
    seconds = before + (data["seconds"] - before) / len(finished)  # the mean of this call
    steps = {layer: tuple(steps) for layer, steps in data["fallbacks"].items()}
    return replace(
        state,
        finished=finished,
        seconds={**state.seconds, "fit": seconds},
        fallbacks={**state.fallbacks, **steps},
    )


def _lost(state: RunState, data: Mapping[str, Any]) -> RunState:
    lost = Lost(state.time, data["worker"], data["node"], data["reason"])
    worker = Worker(data["node"], tuple(data["blocks"]), "lost")
    workers = {**state.workers, lost.worker: worker}
    return replace(state, lost=(*state.lost, lost), workers=workers, wave=_measured_anew(state, state.wave))


def _again(state: RunState, data: Mapping[str, Any]) -> RunState:
    wave = _measured_anew(state, state.wave)
    return replace(state, wave=wave and replace(wave, batches=data["from_batch"]))


def _measured_anew(state: RunState, wave: Wave | None) -> Wave | None:
    """The wave with its times measured from now on, since until now it waited for a worker."""
    return wave and replace(wave, begun=state.elapsed, opening="start", since=None, gaps=0, tokens=0)


def _note(state: RunState, data: Mapping[str, Any]) -> RunState:
    return replace(state, notes=(*state.notes, data["text"]))


def _stop(state: RunState, data: Mapping[str, Any]) -> RunState:
    return replace(state, end="stop", reason=data["reason"], workers={})


def _done(state: RunState, data: Mapping[str, Any]) -> RunState:
    return replace(state, end="done", workers={})


_STEPS: Mapping[str, Callable[[RunState, Mapping[str, Any]], RunState]] = {
    "start": _start,
    "wave": _wave,
    "worker": _worker,
    "batch": _batch,
    "block": _block,
    "lost": _lost,
    "again": _again,
    "note": _note,
    "stop": _stop,
    "done": _done,
}
