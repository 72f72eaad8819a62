"""Which actors live, told by heartbeats, and how long the driver may wait for them.

Every actor answers heartbeats in a thread of its own, whatever else it does. While the driver waits for work, it asks
again and again. An actor that died needs nothing more: Ray raises that in the calls that wait for it. Two kinds of loss
Ray does not tell, so their actors are ended here, and those calls raise:

* an actor that answers no heartbeat (a machine that hangs, a process that is stopped);
* actors that are all idle although the driver waits for one of them: an argument was lost on its way, and Ray would
  search for it for ten minutes.

Time is counted in heartbeats that this process asked for, never in seconds, and compared with the slowest answers so
far. A machine that is starved or suspended asks rarely and answers slowly, so that nobody counts as lost on it.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

BEAT_SECONDS = 2.0
"""Least time between two heartbeats."""
SILENT_BEATS = 30
"""An actor may leave so many heartbeats unanswered."""
IDLE_BEATS = 60
"""All actors may be idle for so many, beside those that a batch needs to travel."""
START_BEATS = 450
"""An actor that starts may leave so many unanswered: imports over a network file system are slow."""
SLOWER = 20
"""An actor may take so many times as long as the slowest answer, or the longest idle time, so far."""
SLOWEST_NETWORK = 10 * 2**20
"""Bytes per second, to allow for a batch that travels while all actors are idle."""
PARTS = ("load", "forward", "fit")

Usage = Mapping[str, Any]


class Heartbeats:
    """Asks the actors of a pool, which may change between two calls, whether they live."""

    def __init__(self, actors: Callable[[], Sequence[Any]], batch_bytes: int = 0) -> None:
        """batch_bytes: of the largest batch, which may travel while all actors are idle."""
        self.actors = actors
        self.listen: Callable[[Any, Usage], None] = lambda *_: None
        """Is called with every answer."""
        self.idle_limit = IDLE_BEATS + int(batch_bytes / SLOWEST_NETWORK / BEAT_SECONDS)
        self.asked: dict[Any, Any] = {}
        """The unanswered request of each actor."""
        self.unanswered: dict[Any, int] = {}
        """For how many beats."""
        self.usage: dict[Any, Usage] = {}
        """The last answer of each actor."""
        self.ended: dict[Any, str] = {}
        """Why, for actors that were ended here."""
        self.slowest, self.idle, self.longest_idle = 0, 0, 0
        self.spent: list[list[float | None]] = []
        """Seconds by activity of each actor, at the last beat."""
        self.last = -math.inf

    def started(self, actor: Any) -> None:
        """Says that an actor has answered somebody, so that it may be silent no longer than others."""
        self.usage.setdefault(actor, {})

    def wait(self, refs: Sequence[Any], meanwhile: Callable[[], None] = lambda: None) -> list[Any]:
        """Like `ray.get`, with heartbeats meanwhile. Raises RayError for a call whose actor is lost, and what
        `meanwhile` raises, which is called again and again."""
        refs, self.idle = list(refs), 0
        while refs:
            done, waiting = ray.wait(refs, num_returns=len(refs), timeout=BEAT_SECONDS, fetch_local=False)
            results = ray.get(done)  # raises at once for one that failed
            if not waiting:
                return results
            self.beat()
            meanwhile()
        return []

    def beat(self) -> None:
        """Collects the answers since the last call, ends the actors that are lost, and asks all again. Does nothing
        when the last call was a moment ago."""
        if time.monotonic() - self.last < BEAT_SECONDS:
            return
        self.last = time.monotonic()
        present = self.actors()
        for actor in self.asked.keys() | self.usage.keys():
            if actor not in present:
                self._forget(actor)
        self._collect()
        self._end_silent()
        self._end_idle(present)
        for actor in present:
            if actor not in self.asked:
                self.asked[actor], self.unanswered[actor] = actor.usage.remote(), 0

    def lost(self) -> list[Any]:
        """The actors that died, of which every other one has answered a new heartbeat when this returns. Ends those
        that are silent."""
        questions = {actor: actor.usage.remote() for actor in self.actors()}
        waiting = list(questions.values())
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=BEAT_SECONDS)
            self.beat()
        return [actor for actor, question in questions.items() if failed(question)]

    def _collect(self) -> None:
        refs = list(self.asked.values())
        answered = set(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else set()
        for actor, ref in list(self.asked.items()):
            if ref not in answered:
                self.unanswered[actor] += 1
                continue
            del self.asked[actor]
            if failed(ref):
                continue  # it died; the calls that wait for it raise that
            if actor in self.usage:  # how long it took to start tells nothing
                self.slowest = max(self.slowest, self.unanswered[actor])
            self.usage[actor] = ray.get(ref)
            self.listen(actor, self.usage[actor])

    def _end_silent(self) -> None:
        limit = max(SILENT_BEATS, SLOWER * self.slowest)
        for actor in list(self.asked):
            if self.unanswered[actor] > (limit if actor in self.usage else max(START_BEATS, limit)):
                self._end(actor, f"a worker hangs: it left {self.unanswered[actor]} heartbeats unanswered")
                self._forget(actor)

    def _end_idle(self, present: Sequence[Any]) -> None:
        """Ends all actors when all have been idle for too long."""
        if any(actor in self.asked for actor in present):
            return  # what it does now is not known
        now = [self.usage.get(actor, {}) for actor in present]
        spent = [[usage.get(part) for part in PARTS] for usage in now]
        if not now or any(usage.get("activity") != "idle" for usage in now) or spent != self.spent:
            self.longest_idle, self.idle = max(self.longest_idle, self.idle), 0
        else:
            self.idle += 1
        self.spent = spent
        if self.idle > max(self.idle_limit, SLOWER * self.longest_idle):
            for actor in present:
                self._end(actor, f"a worker hangs: nobody did anything for {self.idle} heartbeats")
            self.idle = 0

    def _end(self, actor: Any, why: str) -> None:
        self.ended[actor] = why
        ray.kill(actor)

    def _forget(self, actor: Any) -> None:
        for known in (self.asked, self.unanswered, self.usage):
            known.pop(actor, None)


def failed(ref: Any) -> bool:
    """Whether a call that has returned raised what Ray raises."""
    try:
        ray.get(ref)
    except RayError:
        return True
    return False
