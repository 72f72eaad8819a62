"""A lost worker is told from an error of its work. No cluster is needed here."""

import pytest
from qe_cluster.workers import loss_reason
from ray.exceptions import ActorDiedError, NodeDiedError, RayTaskError

from qe_dist.core.errors import CheckpointError


def task_error(cause):
    return RayTaskError("forward", "Traceback of the worker", cause)


def test_an_error_of_the_work_is_raised_as_itself():
    fault = CheckpointError("a tensor contains NaN")
    with pytest.raises(CheckpointError) as raised:
        loss_reason(task_error(task_error(fault)))
    assert raised.value is fault


def test_a_lost_worker_is_named_in_one_line():
    assert loss_reason(NodeDiedError("its node\n failed because of a power cut")) == (
        "a worker died: failed because of a power cut"
    )
    assert loss_reason(task_error(ActorDiedError())).startswith("a worker died: ")
