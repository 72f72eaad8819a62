"""Heartbeats end what hangs, and nothing that is slow. Real actors are stopped and continued by signals."""

import os
import signal
import time

import pytest
import ray
from qe_cluster import heartbeats
from qe_cluster.heartbeats import Heartbeats
from ray.exceptions import ActorDiedError

pytestmark = pytest.mark.ray
BEAT = 0.1
"""Seconds; the limits of the module are in beats."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(heartbeats, "SILENT_BEATS", 20)
    monkeypatch.setattr(heartbeats, "IDLE_BEATS", 20)


@ray.remote(num_cpus=0, concurrency_groups={"watch": 1})
class Actor:
    """As a stage, without a model."""

    def __init__(self, seconds=0.0):
        """seconds: that its imports take."""
        self.activity = "idle"
        time.sleep(seconds)

    @ray.method(concurrency_group="watch")
    def usage(self):
        return {"activity": self.activity, "pid": os.getpid()}

    def work(self, seconds):
        self.activity = "fit"
        time.sleep(seconds)
        self.activity = "idle"
        return "done"

    def take(self, value):
        return value


@pytest.fixture
def actors(cluster):
    made = [Actor.remote() for _ in range(2)]
    yield made
    for actor in made:
        ray.kill(actor)


def pid_of(actor):
    return ray.get(actor.usage.remote())["pid"]


def test_who_answers_may_work_as_long_as_it_takes(actors):
    assert Heartbeats(lambda: actors).wait([actors[0].work.remote(5.0)]) == ["done"]


def test_a_process_that_hangs_is_ended_and_the_call_that_waits_for_it_raises(actors):
    watch = Heartbeats(lambda: actors)
    watch.wait([actor.take.remote(1) for actor in actors])
    os.kill(pid_of(actors[0]), signal.SIGSTOP)
    with pytest.raises(ActorDiedError):
        watch.wait([actors[0].work.remote(0.0)])
    assert watch.lost() == [actors[0]]


def test_a_process_that_goes_on_in_time_is_not_ended(actors):
    watch, pid = Heartbeats(lambda: actors), pid_of(actors[0])
    watch.wait([actors[1].work.remote(5 * BEAT)])
    os.kill(pid, signal.SIGSTOP)
    watch.wait([actors[1].work.remote(10 * BEAT)])
    os.kill(pid, signal.SIGCONT)
    assert watch.wait([actors[0].work.remote(5 * BEAT)]) == ["done"]
    assert watch.slowest >= 3
    assert watch.lost() == []


def test_who_starts_may_take_longer_than_who_answers(cluster):
    slow = Actor.remote(40 * BEAT)
    assert Heartbeats(lambda: [slow]).wait([slow.take.remote(3)]) == [3]
    ray.kill(slow)


def test_who_never_starts_is_ended(cluster, monkeypatch):
    monkeypatch.setattr(heartbeats, "START_BEATS", 30)
    never = Actor.remote(600.0)
    with pytest.raises(ActorDiedError):
        Heartbeats(lambda: [never]).wait([never.take.remote(3)])


def test_while_this_process_is_suspended_nobody_grows_silent(actors):
    watch, pid = Heartbeats(lambda: actors), pid_of(actors[0])
    watch.wait([actors[1].work.remote(5 * BEAT)])
    os.kill(pid, signal.SIGSTOP)
    watch.beat()
    time.sleep(40 * BEAT)  # as if nobody had run: no beat is asked for
    watch.beat()
    os.kill(pid, signal.SIGCONT)
    assert watch.wait([actors[0].work.remote(0.0)]) == ["done"]


def test_when_all_are_idle_but_a_call_does_not_begin_its_actor_is_ended(actors):
    """As when an argument was lost with a node: Ray would look for it for ten minutes."""
    never = ray.remote(lambda: 1).options(num_cpus=1000).remote()
    with pytest.raises(ActorDiedError):
        Heartbeats(lambda: actors).wait([actors[0].take.remote(never)])


def test_a_lost_actor_does_not_delay_what_the_others_did(actors):
    os.kill(pid_of(actors[0]), signal.SIGKILL)
    watch = Heartbeats(lambda: actors)
    assert watch.lost() == [actors[0]]
    assert watch.wait([actors[1].take.remote(2)]) == [2]


def test_what_meanwhile_raises_ends_the_wait(actors):
    def taken_over():
        raise LookupError

    with pytest.raises(LookupError):
        Heartbeats(lambda: actors).wait([actors[0].work.remote(60.0)], taken_over)
