"""The workers of a run: Ray actors in placement groups, added as the cluster has room and replaced when they are lost.

A place is a bundle of a placement group. A worker that is lost leaves its place to its replacement.
"""

import itertools
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qe_cluster.actors import EmbedActor, StageActor
from qe_cluster.heartbeats import Heartbeats, failed
from qe_dist.core.errors import ConfigError, NoRoomError, QEError, TemporaryError
from qe_dist.data.samples import carried
from qe_dist.flow.plan import FREE_SHARE, StagePlan, Task, Wave, WorkerCapacity

PLACEMENT_SECONDS = 10.0  # for a cluster to give the room that it has
LOOK_SECONDS = 1.0  # between two looks at the room, or at where places are
USAGE_SECONDS = 10.0  # for all workers to report their usage at the end of a run
STORE_SHARE = 4  # a batch in flight may lie in the object store twice, and half of the store is left to others

Place = tuple[PlacementGroup, int]


@dataclass(frozen=True, eq=False)
class Worker:
    """An actor that has started, and what it reported of its machine then."""

    actor: Any
    place: Place
    node: str
    """Ray's id of the node."""
    address: str
    kind: str
    """Name of the device; devices of one kind count as equally fast."""
    speed: float
    free: int
    """Free bytes on its device before it loaded anything."""
    host: int
    """Free bytes on its node before it loaded anything."""
    has_nixl: bool


class WorkerPool:
    """The workers of a run, in the order in which batches pass through them. Those without blocks help to fit."""

    def __init__(self, task: Task, worker_timeout: float) -> None:
        """worker_timeout: seconds to wait for the workers that were asked for."""
        self.runs, self.run, self.arch, self.worker_timeout = task.runs, task.runs[0], task.model.arch, worker_timeout
        self.workers: list[Worker] = []
        self.lost_places: list[Place] = []
        """Places of lost workers without a replacement. Ray moves them to another node when one has room."""
        self.groups: list[PlacementGroup] = []
        self.embedders: list[Any] = []
        passing = max(task.footprint(block).passing for block in task.model.kinds)  # a batch is less
        self.heartbeats = Heartbeats(lambda: [*(worker.actor for worker in self.workers), *self.embedders], passing)

    def acquire(self) -> None:
        """Adds the workers that the cluster has room for by now, up to the number that was asked for.

        Only the first call waits `worker_timeout` seconds for all of them; later calls take what is there, and wait
        only when there is no worker at all. Raises ConfigError when the cluster could hold none, NoRoomError when it
        has no room now.
        """
        self._return_to_lost_places()
        missing = (self.run.workers or max(1, self._slots())) - len(self.workers) - len(self.lost_places)
        if self.groups or not self._add_workers(missing, self.worker_timeout):
            self._add_workers(min(missing, self._free_slots()), PLACEMENT_SECONDS)
        deadline = time.monotonic() + PLACEMENT_SECONDS + (self.worker_timeout if self.groups else 0)
        while not self.workers:  # Ray counts late what has just become free, and nodes may come back
            if time.monotonic() > deadline:
                raise self._no_worker_error()
            time.sleep(LOOK_SECONDS)
            self._return_to_lost_places()
            self._add_workers(min(missing, self._free_slots()), PLACEMENT_SECONDS)
        self.workers.sort(key=lambda worker: worker.node)  # neighbours on one node; stable

    def _return_to_lost_places(self) -> None:
        placed = [place for place in self.lost_places if _is_placed(*place)]
        self.lost_places = [place for place in self.lost_places if place not in placed]
        self.workers += self._start(placed)

    def _no_worker_error(self) -> ConfigError:
        kind = NoRoomError if self._slots() else ConfigError
        have, free = ray.cluster_resources(), ray.available_resources()
        counted = ", ".join(f"{free.get(k, 0):g} of {have.get(k, 0):g} {k}s free" for k in self._bundle())
        return kind(
            f"no worker can start: each needs {self._bundle()}, the cluster has {counted}. Add nodes, or give a worker "
            "fewer threads or less memory; a GPU is never shared, for a worker plans with all of its memory"
        )

    def capacities(self) -> list[WorkerCapacity]:
        """What each worker offers to a plan. Workers on the same kind of device count as equally fast."""
        rates: dict[str, list[float]] = {}
        for worker in self.workers:
            rates.setdefault(worker.kind, []).append(worker.speed)
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        capacities = []
        for worker in self.workers:
            node, beside = nodes[worker.node]["Resources"], sum(w.node == worker.node for w in self.workers)
            host = int(FREE_SHARE * min(worker.host, node.get("memory", worker.host))) // beside  # Ray knows containers
            device = int(FREE_SHARE * worker.free) if self.run.device == "cuda" else host
            speed = statistics.median(rates[worker.kind])
            capacities.append(
                WorkerCapacity(self.run.memory or device, speed, worker.address, self.run.host_memory or host)
            )
        return capacities

    def label(self, number: int) -> dict[str, Any]:
        """How events name a worker."""
        return {"worker": number, "node": self.workers[number].address}

    def load(self, wave: Wave, numbers: Sequence[int]) -> None:
        """Has these workers load their blocks of a wave, and returns when they have. Raises RayError for a lost one."""
        parts = {part.worker: part for part in wave}
        self.heartbeats.wait([self.workers[n].actor.load.remote(parts.get(n, StagePlan(n, ()))) for n in numbers])

    def forward(self, number: int) -> Callable[[Any], Any]:
        """Returns a function that sends a batch through a worker and returns a reference to the result.

        The result goes from GPU to GPU when all workers have NIXL, else through Ray's object store.
        """
        method = self.workers[number].actor.forward
        if all(worker.has_nixl and self.run.device == "cuda" for worker in self.workers):
            return lambda batch: method.options(tensor_transport="nixl").remote(batch, stay=True)
        return method.remote

    def usage(self) -> list[dict[str, Any]]:
        """The usage of every worker that answers within USAGE_SECONDS."""
        asked = [worker.actor.usage.remote() for worker in self.workers]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=USAGE_SECONDS) if asked else ([], [])
        return [ray.get(ref) for ref in asked if ref in set(answered) and not failed(ref)]

    def number(self, actor: Any) -> int | None:
        """Which worker an actor is; None for an embedder."""
        return next((i for i, worker in enumerate(self.workers) if worker.actor == actor), None)

    def lost(self) -> list[Worker]:
        """The workers that died or answer no heartbeats. Forgets an embedder of which that is true, so that `embedder`
        starts another one."""
        lost = self.heartbeats.lost()
        self.embedders = [embedder for embedder in self.embedders if embedder not in lost]
        return [worker for worker in self.workers if worker.actor in lost]

    def replace(self, worker: Worker) -> bool:
        """Starts a new worker in the place of a lost one. Returns False, and removes the lost one from the pool, when
        the cluster has no room for it within PLACEMENT_SECONDS."""
        ray.kill(worker.actor)
        deadline = time.monotonic() + PLACEMENT_SECONDS
        while not _is_placed(*worker.place) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        started = self._start([worker.place])  # none when the place is not there, or is lost meanwhile
        where = self.workers.index(worker)
        self.workers[where : where + 1] = started
        return bool(started)

    def close(self) -> None:
        """Ends all workers and returns their resources to the cluster."""
        self.dismiss_embedders()
        for worker in self.workers:
            ray.kill(worker.actor)
        for group in self.groups:
            remove_placement_group(group)

    # -- embedders

    def embedder(self) -> Any:
        """The actor that makes the first block's inputs, on any node; started by the first call."""
        if not self.embedders:
            self.embedders = [EmbedActor.remote(self.run, self.arch)]  # type: ignore[attr-defined]  # as StageActor
        return self.embedders[0]

    def embed_on_gpus(self, samples: Mapping[int, Any]) -> None:
        """Spools these batches of samples as inputs of the first block, by one embedder per GPU.

        When this returns, the GPUs are free for the workers. Raises ConfigError when no embedder can start.
        """
        deadline = time.monotonic() + self.worker_timeout
        while not (free := self._free_slots()):  # nodes may join
            if time.monotonic() > deadline:
                raise self._no_worker_error()
            time.sleep(LOOK_SECONDS)
        count = min(free, self.run.workers or len(samples), len(samples))
        on_gpu = EmbedActor.options(num_gpus=1)  # type: ignore[attr-defined]  # as StageActor
        self.embedders = [on_gpu.remote(self.run, self.arch) for _ in range(count)]
        turns = itertools.cycle(self.embedders)
        self.heartbeats.wait(
            [next(turns).spool_only.remote(i, list(map(carried, batch))) for i, batch in samples.items()]
        )
        self.heartbeats.wait([embedder.flush.remote() for embedder in self.embedders])
        self.dismiss_embedders()

    def dismiss_embedders(self) -> None:
        """Ends the embedders, when nothing is left to embed."""
        for embedder in self.embedders:
            ray.kill(embedder)
        self.embedders = []

    # -- places

    def _bundle(self) -> dict[str, float]:
        """The resources that Ray reserves for one worker."""
        bundle: dict[str, float] = {"CPU": self.run.threads}
        if self.run.device == "cuda":
            bundle["GPU"] = 1
        elif self.run.memory is not None:
            bundle["memory"] = self.run.memory
        return bundle

    def _slots(self) -> int:
        """The number of workers that the living nodes could hold if nothing else ran there."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return sum(min(int(node.get(kind, 0) // need) for kind, need in self._bundle().items()) for node in nodes)

    def _free_slots(self) -> int:
        free = ray.available_resources()
        return min(int(free.get(kind, 0) // need) for kind, need in self._bundle().items())

    def _add_workers(self, count: int, timeout: float) -> bool:
        """Adds `count` workers, or none and returns False when there is no room for all within `timeout` seconds.

        Workers on GPUs are placed close together, since batches travel between them; workers on CPUs are spread, since
        those on one node share its memory and memory bandwidth.
        """
        if count <= 0:
            return False
        group = placement_group([self._bundle()] * count, strategy="PACK" if self.run.device == "cuda" else "SPREAD")
        self.groups.append(group)
        if not group.wait(timeout):
            remove_placement_group(self.groups.pop())
            return False
        self.workers += self._start([(group, i) for i in range(count)])
        return True

    def _start(self, places: Sequence[Place]) -> list[Worker]:
        """Starts an actor in each place and asks it for its machine. Leaves out those that are lost meanwhile, and
        notes their places. When one cannot start for another reason, all are ended and its error is raised."""
        actors = {place: self._actor(*place) for place in places}
        asked = {place: actor.survey.remote() for place, actor in actors.items()}
        try:
            self._await_starts(actors, asked)
            lost = [place for place in places if _is_lost(asked[place])]
        except Exception:
            for actor in actors.values():
                ray.kill(actor)
            raise
        self.lost_places += lost
        for place in places:
            self.heartbeats.started(actors[place])
        return [Worker(actors[place], place, **ray.get(asked[place])) for place in places if place not in lost]

    def _await_starts(self, actors: Mapping[Place, Any], asked: Mapping[Place, Any]) -> None:
        """Returns when every actor has answered or is lost. Ends those whose place went down with its node: Ray would
        wait for room for another place."""
        waiting = list(asked)
        heartbeats, gone = Heartbeats(lambda: [actors[place] for place in waiting]), Counter[Place]()
        while waiting:
            answered, _ = ray.wait([asked[p] for p in waiting], num_returns=len(waiting), timeout=LOOK_SECONDS)
            waiting = [place for place in waiting if asked[place] not in answered]
            for place in waiting:
                gone[place] = 0 if _is_placed(*place) else gone[place] + 1
                if gone[place] * LOOK_SECONDS > PLACEMENT_SECONDS:
                    ray.kill(actors[place])
            heartbeats.beat()

    def _actor(self, group: PlacementGroup, bundle: int) -> Any:
        needs = self._bundle()
        return StageActor.options(  # type: ignore[attr-defined]  # mypy does not follow decorators of classes
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            memory=needs.get("memory"),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        ).remote(self.runs, self.arch)


def transfer_bytes() -> int:
    """Bytes that a run may have in any node's object store at a time: a share of the smallest store."""
    stores = [node["Resources"].get("object_store_memory", 2**30) for node in ray.nodes() if node["Alive"]]
    return int(min(stores)) // STORE_SHARE


def loss_reason(error: RayError) -> str:
    """Says in one line why a worker was lost.

    Raises an error of the work itself, such as a CheckpointError, as it is, and QEError for a worker that cannot start.
    """
    cause: BaseException = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if not isinstance(cause, RayError):
        raise cause from (None if isinstance(cause, QEError) else error)
    if memory := out_of_memory(cause):
        return memory
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if getattr(cause, "actor_init_failed", False):
        raise QEError(f"a worker could not start: {lines[-1]}; is qe_dist installed on every node?") from None
    line = next((line for line in lines if " because " in line), lines[0])
    return f"a worker died: {line.partition(' Some common causes')[0]}"


def out_of_memory(error: BaseException) -> str | None:
    """Says in one line which process Ray killed since its node ran out of memory; None for another loss."""
    said = " ".join(str(error).split())
    if "running low on memory" not in said:
        return None
    node = re.search(r"Memory on the node \(IP: ([^,]+),.*?\) was ([\d.]+)GB used / ([\d.]+)GB", said)
    process = re.search(r"pid=(\d+), actual memory used=([\d.]+)GB", said)
    where = f"node {node[1]} had {node[2]} of {node[3]} GB in use" if node else "its node had no memory left"
    which = f"process {process[1]}, which had {process[2]} GB," if process else "a worker"
    return f"Ray killed {which} when {where}"


def _is_placed(group: PlacementGroup, bundle: int) -> bool:
    """Whether a living node holds the bundle."""
    node = placement_group_table(group)["bundles_to_node_id"].get(bundle)
    return any(known["NodeID"] == node and known["Alive"] for known in ray.nodes())


def _is_lost(ref: Any) -> bool:
    """Whether the actor of a start that has returned is lost. Raises as `loss_reason` does, and TemporaryError when its
    node has no memory for a worker without blocks."""
    try:
        ray.get(ref)
    except RayError as error:
        reason = loss_reason(error)
        if out_of_memory(error):
            raise TemporaryError(
                f"{reason}, while it started: there is no memory for this many workers. Give fewer --workers, or end "
                "what else runs there"
            ) from None
        return True
    return False
