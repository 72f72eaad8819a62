"""One quantization in one process, as a command: arguments in, its cost out as a line of JSON.

`peer.py` and `ours.py` share this, so that both sides are started and measured in the same way.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Arguments:
    model: Path
    output: Path
    recipe: str
    calibration: Path
    threads: int

    @classmethod
    def parse(cls, description: str) -> "Arguments":
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("model", type=Path, help="Hugging Face model directory")
        parser.add_argument("output", type=Path, help="directory of the checkpoint")
        parser.add_argument("--recipe", required=True)
        parser.add_argument("--calibration", type=Path, required=True)
        parser.add_argument("--threads", type=int, default=1)
        return cls(**vars(parser.parse_args()))


def peak_mib() -> float:
    """Of this process so far. `getrusage` would not do: on Linux it starts at the resident size of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


@dataclass
class Cost:
    """Made when everything is imported."""

    imported_mib: float = field(default_factory=peak_mib)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    """Of the same phases; on a machine that others use too, they say more."""

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[phase] = time.perf_counter() - wall
        self.cpu_seconds[phase] = time.process_time() - cpu

    def print(self, bits_per_weight: float, packages: tuple[str, ...]) -> None:
        """The last line of standard output."""
        found = {"bits_per_weight": bits_per_weight, **vars(self), "peak_mib": peak_mib()}
        print(json.dumps(found | {"versions": {name: version(name) for name in packages}}), flush=True)
