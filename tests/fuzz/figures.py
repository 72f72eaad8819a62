"""Draws so many inputs of every kind, and prints what came of them.

    python -m tests.fuzz.figures --count 2000 --seed 1

Ends with 1 where an input came to something else than a right result or one clear line, and shows the first ones.
"""

import argparse
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.kinds import Kind, Place, kinds

SHOWN = 3
"""Most inputs of a fault that are shown."""


class Found:
    """What came of the inputs of one kind."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.faults: dict[str, list[str]] = {}
        self.slowest = 0.0

    def run(self, kind: Kind, place: Place, drawn: object) -> None:
        begin = time.process_time()
        try:
            self.outcomes[kind.check(place, drawn)] += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            name = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
            self.outcomes["FAULT"] += 1
            self.faults.setdefault(name, []).append(f"{str(error)[:300]!r} for {str(drawn)[:300]!r}")
        self.slowest = max(self.slowest, time.process_time() - begin)


def draw(kind: Kind, place: Place, count: int, seed: int) -> Found:
    """Runs a kind on `count` inputs that follow from the seed."""
    found = Found()

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.inputs)
    def every(drawn: object) -> None:
        found.run(kind, place, drawn)

    every()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=1)
    given_words = parser.parse_args()
    total, faults = 0, 0
    with tempfile.TemporaryDirectory(prefix="qe-fuzz-") as folder:
        place = Place(Path(folder))
        every = kinds(place)
        for name, kind in every.items():
            found = draw(kind, place, -(-given_words.count // len(every)), given_words.seed)
            number = sum(found.outcomes.values())
            total, faults = total + number, faults + found.outcomes["FAULT"]
            told = ", ".join(f"{n} {outcome}" for outcome, n in sorted(found.outcomes.items()))
            print(f"{name}: {number} inputs: {told}; slowest {found.slowest:.1f} s", flush=True)
            for fault, cases in found.faults.items():
                print(f"  {fault}: {len(cases)}", *cases[:SHOWN], sep="\n    ", flush=True)
    print(f"{total} inputs, seed {given_words.seed}: {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
