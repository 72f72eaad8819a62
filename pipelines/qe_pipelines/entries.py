"""The measured recipes of `compare`, their tables and plots: which is best at which size, and against its control."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

SLACK = 0.05
"""Bits per weight that a control may have more than the recipe beside it and still count as equally large."""


@dataclass(frozen=True)
class Entry:
    """A measured recipe. Sizes are per quantized weight, losses relative to the model in full precision."""

    recipe: str
    scheme: str
    bits: float
    """Bits stored."""
    active_bits: float
    """Bits read for one token."""
    macs: float
    """Multiplications for one token; 1.0 is the linear alone."""
    accuracy: float | None
    perplexity: float | None
    kl: float
    kinds: Mapping[str, Any]
    fit_seconds: float
    fallbacks: int
    arithmetic: str = ""
    """What the product executes: `a16` or `int8`."""
    control: bool = False
    """Whether it is a control that other recipes must beat: W4A16, or GPTQ alone at W4A8 int8."""
    mib: float = 0.0
    """Size of all files of the checkpoint."""
    agreement: float | None = None
    intervals: Mapping[str, Any] = field(default_factory=dict)
    modalities: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    """Every sample's numbers, by column (`checkpoint.quality.SampleScore`)."""


def scheme_of(written: str) -> str:
    """The number format in which recipes are compared, such as `w4a8`: bits of weights and activations. Scale groups
    and dynamic outlier channels do not count, since the sizes have them."""
    from qe_dist.core.scheme import Scheme

    scheme = Scheme.parse(written)
    return f"w{scheme.weight_bits}a{scheme.act_bits or 16}"


def is_control(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe, as the manifest describes it, is a control."""
    from qe_dist.core.scheme import Scheme

    scheme, arithmetic = scheme_of(recipe["scheme"]), Scheme.parse(recipe["scheme"]).arithmetic
    plain = recipe["quantizer"]["name"] == "gptq" and recipe["compensation"]["name"] == "none"
    return scheme == "w4a16" or (scheme == "w4a8" and arithmetic == "int8" and plain)


def by_arithmetic(entries: Sequence[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    """Title and entries of each table, sorted by KL. A table has the entries of one arithmetic and number format."""
    for arithmetic, scheme in sorted({(e.arithmetic, e.scheme) for e in entries}):
        own = [e for e in entries if (e.arithmetic, e.scheme) == (arithmetic, scheme)]
        yield f"{scheme}-{arithmetic}", sorted(own, key=lambda e: e.kl)


def control_of(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The best control that is not larger than an entry, and not the entry itself; None when there is none."""
    fair = [e for e in entries if e.control and e.recipe != entry.recipe and e.bits <= entry.bits + SLACK]
    return min(fair, key=lambda e: e.kl, default=None)


def front(entries: Sequence[Entry], size: str) -> list[Entry]:
    """The entries with a smaller KL than every entry of at most the same size.

    size: `bits`, `active_bits` or `macs`.
    """

    def key(entry: Entry) -> tuple[float, float]:
        return getattr(entry, size), entry.kl

    best: list[Entry] = []
    for entry in sorted(entries, key=key):
        if not best or entry.kl < best[-1].kl or key(entry) == key(best[-1]):
            best.append(entry)
    return best


HEADER = ("recipe", "bits/weight", "active bits", "multiplications", "accuracy", "perplexity", "KL", "fit s", "wins at")
PAIRED = ("agreement", "95 % of KL", "KL less that of the control, 95 %", "control")


def cells(entry: Entry, entries: Sequence[Entry]) -> tuple[str, ...]:
    """An entry as a row under HEADER. It wins at the sizes at which it belongs to the front."""
    names = {"bits": "bytes", "active_bits": "active bytes", "macs": "multiplications"}
    wins = [name for size, name in names.items() if entry in front(entries, size)]
    return (
        entry.recipe,
        f"{entry.bits:.2f}",
        f"{entry.active_bits:.2f}",
        f"{entry.macs:.3f}",
        "" if entry.accuracy is None else f"{entry.accuracy:.1%}",
        "" if entry.perplexity is None else f"{entry.perplexity:.3f}",
        f"{entry.kl:.5f}",
        f"{entry.fit_seconds:.1f}",
        ", ".join(wins),
    )


def paired(entry: Entry, entries: Sequence[Entry]) -> tuple[str, ...]:
    """The cells of an entry under PAIRED: intervals over the samples, also of its difference from its control."""
    from qe_dist.checkpoint.quality import Quality, difference

    agreement = "" if entry.agreement is None else f"{entry.agreement:.1%}"
    control = control_of(entry, entries)
    if control is None or not (entry.scores and control.scores):
        return (agreement, _written(entry.intervals.get("kl"), ""), "", "")
    gap, found = difference("kl", Quality.from_columns(entry.scores), Quality.from_columns(control.scores))
    return (
        agreement,
        _written(entry.intervals.get("kl"), ""),
        f"{gap:+.5f} {_written(found, '+')}".rstrip(),
        control.recipe,
    )


def _written(found: Sequence[float] | None, sign: str) -> str:
    return "" if found is None else f"[{found[0]:{sign}.5f}, {found[1]:{sign}.5f}]"


def table_of(title: str, own: Sequence[Entry], entries: Sequence[Entry]) -> Table:
    """A table with a row for each of `own`, and below them the controls among all `entries` of the comparison."""
    table = Table(*HEADER, *PAIRED, title=title)
    for entry in own:
        style = "bold" if entry in front(own, "bits") else None
        table.add_row(*cells(entry, own), *paired(entry, entries), style=style)
    table.add_section()
    for entry in sorted((e for e in entries if e.control and e not in own), key=lambda e: e.kl):
        table.add_row(*cells(entry, [])[:-1], f"control, {entry.arithmetic}", *paired(entry, entries), style="dim")
    return table


def plot(entries: Sequence[Entry], title: str, path: Path) -> None:
    """Plots KL over stored bits into `path`. The line is the front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel="stored bits per weight", ylabel="KL from full precision", yscale="log")
    winners = front(entries, "bits")
    axes.step([e.bits for e in winners], [e.kl for e in winners], where="post", color="0.7", zorder=0)
    for entry in entries:
        color = "C3" if entry in winners else "C0"
        axes.plot(entry.bits, entry.kl, "o", color=color)
        axes.annotate(entry.recipe, (entry.bits, entry.kl), xytext=(4, 2), textcoords="offset points", fontsize=7)
    figure.savefig(path, dpi=150)
