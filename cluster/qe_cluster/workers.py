"""Who works: actors in placement groups, as many as are asked for or as the cluster has; they come, go and are lost."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qe_cluster.actors import EmbedActor, StageActor
from qe_dist.core.errors import ConfigError
from qe_dist.flow.config import RunConfig
from qe_dist.flow.plan import FREE_SHARE, WorkerCapacity

SOON = 10.0  # seconds in which a cluster gives what it has
SILENT = 60.0  # seconds after which a worker that says nothing counts as lost
START = 180.0  # seconds that a worker may take to start: imports over a network file system are slow

Place = tuple[PlacementGroup, int]


@dataclass(frozen=True, eq=False)
class Worker:
    actor: Any
    place: Place
    """Placement group and bundle, which it leaves to its replacement."""
    node: str
    address: str
    kind: str
    speed: float
    free: int
    """Bytes on its device before it loaded anything."""
    host: int
    """Bytes of its node then."""
    has_nixl: bool


class WorkerPool:
    """The workers of a run, in the order in which batches pass through them. Who has no block helps to fit."""

    def __init__(self, runs: Sequence[RunConfig], arch: str, patience: float) -> None:
        self.runs, self.run, self.arch, self.patience = runs, runs[0], arch, patience
        self.workers: list[Worker] = []
        self.vacant: list[Place] = []
        """Of workers that were lost and not replaced; Ray finds such a bundle another node when there is one."""
        self.groups: list[PlacementGroup] = []
        self.embedders: list[Any] = []

    def acquire(self) -> list[Worker]:
        """Those at hand, and others that the cluster has by now. Only the first call waits for as many as were asked
        for; later, what is left of a cluster is made do with."""
        placed = [place for place in self.vacant if _is_placed(*place)]
        self.vacant = [place for place in self.vacant if place not in placed]
        self.workers += self._welcome(placed)
        missing = (self.run.workers or max(1, self._slots())) - len(self.workers) - len(self.vacant)
        if self.groups or not self._hire(missing, self.patience):
            self._hire(min(missing, self._free_slots()), SOON)
        if not self.workers:
            raise self._refusal()
        self.workers.sort(key=lambda worker: worker.node)  # neighbours on one node; stable
        return self.workers

    def _refusal(self) -> ConfigError:
        have, free = ray.cluster_resources(), ray.available_resources()
        counted = ", ".join(f"{free.get(k, 0):g} of {have.get(k, 0):g} {k}s free" for k in self._bundle())
        return ConfigError(
            f"no worker can start: each needs {self._bundle()}, the cluster has {counted}. Add nodes, or give a worker "
            "fewer threads or less memory; a GPU is never shared, for a worker plans with all of its memory"
        )

    def capacities(self) -> list[WorkerCapacity]:
        """What the workers offer to a plan. Workers on equal devices count as equally fast."""
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

    def forward(self, number: int) -> Callable[[Any], Any]:
        """Submits a batch to a worker. Its result goes from GPU to GPU where NIXL is installed for all, else through
        Ray's object store."""
        method = self.workers[number].actor.forward
        if all(worker.has_nixl and self.run.device == "cuda" for worker in self.workers):
            return lambda batch: method.options(tensor_transport="nixl").remote(batch, stay=True)
        return method.remote

    def usage(self) -> list[dict[str, Any]]:
        """Of those who answer."""
        asked = [worker.actor.usage.remote() for worker in self.workers]
        return [ray.get(ref) for ref in asked if _answered(ref, SOON)]

    def check_embedder(self) -> None:
        """Forgets one that died."""
        if self.embedders and not _answered(self.embedders[0].flush.remote(), SILENT):
            self.embedders = []

    def lost(self) -> list[Worker]:
        """Who does not answer. Returns when every worker has answered, died, or kept silent for too long."""
        asked = {worker.actor.usage.remote(): worker for worker in self.workers}
        ray.wait(list(asked), num_returns=len(asked), timeout=SILENT)
        return [worker for ref, worker in asked.items() if not _answered(ref, 0)]

    def replace(self, worker: Worker) -> bool:
        """Puts a new worker in the place of a lost one, where there is room for it soon; else goes on without."""
        ray.kill(worker.actor)
        deadline = time.monotonic() + SOON
        while not _is_placed(*worker.place) and time.monotonic() < deadline:
            time.sleep(0.2)
        if _is_placed(*worker.place):
            with suppress(RayError):  # a node may die again
                self.workers[self.workers.index(worker)] = self._welcome([worker.place])[0]
                return True
        self.workers.remove(worker)
        self.vacant.append(worker.place)
        return False

    def close(self) -> None:
        """Gives all workers and their places back."""
        self.dismiss_embedders()
        for worker in self.workers:
            ray.kill(worker.actor)
        for group in self.groups:
            remove_placement_group(group)

    def embedder(self) -> Any:
        """Makes the first block's inputs beside the workers, on any node."""
        if not self.embedders:
            self.embedders = [EmbedActor.options(num_cpus=0).remote(self.run, self.arch)]
        return self.embedders[0]

    def embed_on_gpus(self, samples: Mapping[int, Any]) -> None:
        """Spools the first block's inputs by one embedder for every GPU, which then are free for the workers."""
        count = min(max(1, self._slots()), self.run.workers or len(samples), len(samples))
        self.embedders = [EmbedActor.options(num_cpus=0, num_gpus=1).remote(self.run, self.arch) for _ in range(count)]
        waiting = START if self._slots() else self.patience
        try:
            ray.get([embedder.flush.remote() for embedder in self.embedders], timeout=waiting)
        except GetTimeoutError:
            raise self._refusal() from None
        turns = itertools.cycle(self.embedders)
        ray.get([next(turns).spool_only.remote(i, batch) for i, batch in samples.items()])
        ray.get([embedder.flush.remote() for embedder in self.embedders])
        self.dismiss_embedders()

    def dismiss_embedders(self) -> None:
        for embedder in self.embedders:
            ray.kill(embedder)
        self.embedders = []

    # -- places

    def _bundle(self) -> dict[str, float]:
        bundle: dict[str, float] = {"CPU": self.run.threads}
        if self.run.device == "cuda":
            bundle["GPU"] = 1
        elif self.run.memory is not None:
            bundle["memory"] = self.run.memory
        return bundle

    def _slots(self) -> int:
        """How many workers the living nodes could hold if nobody else used them."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return sum(min(int(node.get(kind, 0) // need) for kind, need in self._bundle().items()) for node in nodes)

    def _free_slots(self) -> int:
        free = ray.available_resources()
        return min(int(free.get(kind, 0) // need) for kind, need in self._bundle().items())

    def _hire(self, count: int, timeout: float) -> bool:
        """So many more workers, or none: on GPUs close together, for batches travel; on CPUs apart, for memory and
        its bandwidth are what neighbours share."""
        if count <= 0:
            return False
        group = placement_group([self._bundle()] * count, strategy="PACK" if self.run.device == "cuda" else "SPREAD")
        self.groups.append(group)
        if not group.wait(timeout):
            remove_placement_group(self.groups.pop())
            return False
        self.workers += self._welcome([(group, i) for i in range(count)])
        return True

    def _welcome(self, places: Sequence[Place]) -> list[Worker]:
        actors = [self._actor(*place) for place in places]
        try:
            facts = ray.get([actor.survey.remote() for actor in actors], timeout=START)
        except Exception:
            for actor in actors:
                ray.kill(actor)
            raise
        return [Worker(actor, place, **fact) for actor, place, fact in zip(actors, places, facts, strict=True)]

    def _actor(self, group: PlacementGroup, bundle: int) -> Any:
        needs = self._bundle()
        return StageActor.options(
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            memory=needs.get("memory"),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        ).remote(self.runs, self.arch)


def _is_placed(group: PlacementGroup, bundle: int) -> bool:
    """Whether a living node holds the bundle."""
    node = placement_group_table(group)["bundles_to_node_id"].get(bundle)
    return any(known["NodeID"] == node and known["Alive"] for known in ray.nodes())


def _answered(ref: Any, timeout: float) -> bool:
    try:
        ray.get(ref, timeout=timeout)
    except RayError:
        return False
    return True
