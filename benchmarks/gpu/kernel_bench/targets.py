"""What the kernels are to reach on an H100, beside what bench_kernels.py measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""A measurement of bench_kernels.py."""
LAYERS = ("qkv", "o", "gate_up", "down")
DECODE, MIDDLE, PREFILL = (1, 4, 16), (64, 256), 4096
GROUPED, CHANNEL = "w4a16g128", "w4a8"


@dataclass(frozen=True)
class Target:
    name: str
    at_least: bool
    """Else at most."""
    wanted: float
    found: float | None
    """The worst of those that count; None where one of them was not measured."""

    @property
    def met(self) -> bool | None:
        if self.found is None:
            return None
        return self.found >= self.wanted if self.at_least else self.found <= self.wanted


def targets(rows: Sequence[Row]) -> list[Target]:
    """Of Qwen2-VL-72B, with the routed experts (int8 factors)."""
    return list(_targets(_Measured(rows)))


class _Measured:
    """Seconds and fractions of the 72B model's layers; None where one is missing."""

    def __init__(self, rows: Sequence[Row]) -> None:
        names = ("layer", "tokens", "format", "repair", "part")
        self.rows = {tuple(row[n] for n in names): row for row in rows if row["model"] == "72B"}

    def reached(self, layer: str, tokens: int, format: str) -> float | None:
        row = self.rows.get((layer, tokens, format, "experts", "whole"))
        return None if row is None else row["floor"] / row["seconds"]

    def seconds(self, layers: Sequence[str], tokens: int, format: str, repair: str = "experts") -> float | None:
        part = "torch" if format == "bf16" else "whole"
        found = [self.rows.get((layer, tokens, format, repair, part)) for layer in layers]
        return None if None in found else sum(row["seconds"] for row in found if row is not None)

    def faster(self, layers: Sequence[str], tokens: int, format: str) -> float | None:
        """Times as fast as torch's bf16."""
        return _over(self.seconds(layers, tokens, "bf16", "bare"), self.seconds(layers, tokens, format))


def _targets(m: _Measured) -> Iterator[Target]:
    for format in (GROUPED, CHANNEL):
        for layers, wanted in (("gate_up", "down"), 0.8), (("qkv", "o"), 0.6):
            name = f"{format}, M up to 16: of the bandwidth on {' and '.join(layers)}"
            yield Target(name, True, wanted, _worst(min, [m.reached(x, t, format) for x in layers for t in DECODE]))
        cost = [_over(m.seconds(LAYERS, t, format), m.seconds(LAYERS, t, format, "bare")) for t in DECODE]
        yield Target(
            f"{format}, M up to 16: time of the block over that without branches", False, 1.06, _worst(max, cost)
        )
        block = [m.faster(LAYERS, t, format) for t in DECODE]
        yield Target(f"{format}, M up to 16: the block, times as fast as bf16", True, 3.2, _worst(min, block))
        middle = [m.faster((x,), t, format) for x in LAYERS for t in MIDDLE]
        yield Target(f"{format}, M = 64 and 256: each layer, times as fast as bf16", True, 1.0, _worst(min, middle))
    for format, wanted in ((CHANNEL, 1.6), (GROUPED, 0.9)):
        name = f"{format}, M = {PREFILL}: the block, times as fast as bf16"
        yield Target(name, True, wanted, m.faster(LAYERS, PREFILL, format))


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _worst(choose: Any, found: Sequence[float | None]) -> float | None:
    return None if None in found else choose(found)
