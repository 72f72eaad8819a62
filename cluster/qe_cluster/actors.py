"""The stages and the embedder of `qe_dist.flow` as Ray actors."""

from collections.abc import Sequence
from typing import Any

import ray

from qe_dist.core.batch import Batch
from qe_dist.core.sample import Sample
from qe_dist.flow.calibrate import Embedder
from qe_dist.flow.stage import Stage


@ray.remote(concurrency_groups={"watch": 1}, enable_tensor_transport=True)  # type: ignore[call-overload]  # not in its hints
class StageActor(Stage):
    """A stage that reports its usage while it works, and the node that it is on."""

    @ray.method(concurrency_group="watch")
    def usage(self) -> dict[str, Any]:  # type: ignore[override]  # hinted as what a caller of the actor sees
        return super().usage()

    def survey(self) -> dict[str, Any]:
        where = {"node": ray.get_runtime_context().get_node_id(), "address": ray.util.get_node_ip_address()}
        return super().survey() | where


@ray.remote(num_cpus=0, concurrency_groups={"watch": 1})  # type: ignore[call-overload]  # not in its hints
class EmbedActor(Embedder):
    """An embedder that answers heartbeats while it works."""

    activity = "idle"

    def embed(self, index: int, samples: Sequence[Sample]) -> Batch:
        self.activity = "embed"
        try:
            return super().embed(index, samples)
        finally:
            self.activity = "idle"

    @ray.method(concurrency_group="watch")
    def usage(self) -> dict[str, Any]:
        """What it does at the moment."""
        return {"activity": self.activity}
