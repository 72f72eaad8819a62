"""Metrics of a run for Prometheus, on the metrics port of the driver's node, beside Ray's own.

`ray.util.metrics` collects them. A node serves them when `ray[default]` is installed there; without it the run goes on
and nothing is served.
"""

import threading
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

MIB = 2**20
PARTS = ("load", "forward", "fit")
FIT_SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
REFRESH_SECONDS = 5.0
"""Ray drops a gauge that was not set again within two of its reports, every 10 s by default."""

Tags = dict[str, str]


class Metrics:
    """A listener of the driver, and a context manager around the run, for which Ray must be connected.

    Prometheus sees the names with `ray_` in front.
    """

    def __init__(self) -> None:
        worker = ("worker", "node")
        self.tokens = Counter("qe_tokens", "Calibration tokens that went through a wave")
        self.blocks = Gauge("qe_blocks", "Blocks of the model")
        self.done = Gauge("qe_blocks_done", "Finished blocks")
        self.waves = Counter("qe_waves", "Waves begun")
        self.again = Counter("qe_waves_again", "Waves streamed again because a worker was lost")
        self.lost = Counter("qe_workers_lost", "Workers that died", worker)
        self.seconds = Counter("qe_worker_seconds", "Time of workers by part of the work", (*worker, "part"))
        self.fit = Histogram("qe_block_fit_seconds", "To fit and publish a block", FIT_SECONDS)
        self.memory = Gauge("qe_worker_memory_bytes", "Memory of a worker's process", worker)
        self.peak = Gauge("qe_worker_peak_memory_bytes", "Peak memory of a worker's process", worker)
        self._finished = 0
        self._spent: dict[tuple[int, str], float] = {}
        """Seconds that are added to `seconds` already, by worker and part."""
        self._model: dict[Gauge, float] = {}
        self._of_worker: dict[int, tuple[Tags, dict[Gauge, float]]] = {}
        """Tags and current gauge values of each worker."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="metrics", daemon=True)

    def __enter__(self) -> "Metrics":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def __call__(self, event: str, data: Mapping[str, Any]) -> None:
        match event:
            case "start":
                self._finished = data["done"]
                self._model = {self.blocks: data["blocks"], self.done: self._finished}
            case "wave":
                self.waves.inc()
            case "batch":
                self.tokens.inc(data["tokens"])
            case "block":
                self._finished += 1
                self._model = {**self._model, self.done: self._finished}
                self.fit.observe(data["seconds"])
            case "worker":
                self._worker(data)
            case "lost":
                self._forget(data["worker"])
                self.lost.inc(tags=_tags(data))
            case "again":
                self.again.inc()
        self._set()

    def _worker(self, data: Mapping[str, Any]) -> None:
        memory = {self.memory: data["memory_mib"] * MIB, self.peak: data["peak_mib"] * MIB}
        self._of_worker[data["worker"]] = _tags(data), memory
        for part in PARTS:
            new = data[part] - self._spent.get((data["worker"], part), 0.0)
            if new > 0:
                self._spent[data["worker"], part] = data[part]
                self.seconds.inc(new, {**_tags(data), "part": part})

    def _forget(self, worker: int) -> None:
        """Drops the gauges of a lost worker. Its replacement counts its seconds from zero."""
        self._of_worker.pop(worker, None)
        for part in PARTS:
            self._spent.pop((worker, part), None)

    def _refresh(self) -> None:
        """Sets the gauges again and again, in a thread, so that Ray does not drop them."""
        while not self._end.wait(REFRESH_SECONDS):
            self._set()

    def _set(self) -> None:
        for tags, values in [({}, self._model), *list(self._of_worker.values())]:
            for gauge, value in values.items():
                gauge.set(value, tags)


def _tags(data: Mapping[str, Any]) -> Tags:
    return {"worker": str(data["worker"]), "node": data["node"]}
