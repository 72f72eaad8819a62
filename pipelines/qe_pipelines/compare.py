"""`qe-dist compare`: any set of recipes over one pass of statistics; who wins at which size."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qe_pipelines.evaluate import encode
from qe_pipelines.progress import run_view, set_up_logging
from qe_pipelines.results import write_result


@dataclass(frozen=True)
class Entry:
    """One recipe, measured. Sizes are per quantized weight, losses against the model in full precision."""

    recipe: str
    scheme: str
    bits: float
    """Stored."""
    active_bits: float
    """Read for one token."""
    macs: float
    """Multiplications for one token; 1.0 is the linear alone."""
    accuracy: float | None
    perplexity: float | None
    kl: float
    kinds: Mapping[str, Any]
    fit_seconds: float
    fallbacks: int


def compare(
    model: Annotated[Path | None, typer.Argument(help="Hugging Face model directory")] = None,
    recipes: Annotated[str, typer.Option(help="comma-separated names or TOML files, such as rtn-w4a6,qe-w4a6")] = "",
    calibration: Annotated[Path | None, typer.Option(help="JSON-lines file of samples to calibrate with")] = None,
    data: Annotated[Path | None, typer.Option(help="JSON-lines file of samples to measure with")] = None,
    output: Annotated[Path | None, typer.Option(help="directory for a checkpoint of every recipe")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="print what recipes are made of, and stop")] = False,
    workers: Annotated[int | None, typer.Option(help="Ray workers; default: as for quantize")] = None,
    ray_address: Annotated[str | None, typer.Option(help="address of a running Ray cluster")] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
) -> None:
    """Fit RECIPES to MODEL, measure what is left of it, and show who wins at which size.

    OUTPUT gets a checkpoint for each recipe, compare.json with all numbers, and a plot for each number format.
    """
    set_up_logging(None)
    if list_all:
        _print_members()
        return
    from qe_dist.core.errors import ConfigError

    names = list(dict.fromkeys(part.strip() for part in recipes.split(",") if part.strip()))
    given = {"MODEL": model, "--recipes": names, "--calibration": calibration, "--data": data, "--output": output}
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise ConfigError(f"compare needs {', '.join(missing)} (or --list alone)")
    from qe_cluster import launch

    from qe_dist.flow.config import RunConfig
    from qe_dist.methods.recipes import load_recipe

    loaded = {folder: load_recipe(name) for folder, name in _folders(names).items()}
    encoded = encode(model, data)  # what is wrong with them shall be said before any work
    here = launch.resources(ray_address)
    runs = [
        RunConfig(
            model, recipe, calibration, output / folder, workers or here.workers(1), device=here.device, seed=seed
        )
        for folder, recipe in loaded.items()
    ]
    console = _console()
    with launch.ray_cluster(ray_address, max(run.workers for run in runs)):
        fit(runs)
        entries = measure(runs, *encoded)
    write_result(output / "compare.json", {"model": str(model), "entries": [vars(e) for e in entries]})
    for scheme, group in by_scheme(entries):
        console.print(table_of(scheme, group))
        plot(group, f"{model.name}, {scheme}", output / f"{scheme}.png")
    console.print(f"numbers and plots are in {output}", highlight=False, soft_wrap=True)


def fit(runs: Sequence[Any]) -> None:
    """All checkpoints; runs of the same rotated model share one pass of the calibration."""
    from qe_cluster import driver

    def rotation(run: Any) -> str:
        return repr(run.recipe.rotation)

    for _, together in groupby(sorted(runs, key=rotation), key=rotation):
        with run_view(quiet=False) as view:
            driver.quantize(*together, listen=view.without_lines())


def measure(runs: Sequence[Any], arch: Any, examples: Sequence[Any]) -> list[Entry]:
    """Every checkpoint against the model in full precision, as Ray tasks; in the order of the runs."""
    import ray
    from ray.exceptions import RayTaskError

    options = {"num_cpus": 1, "num_gpus": 0 if runs[0].device == "cpu" else 1}
    shared = ray.put(examples)  # encoding them costs as much as a checkpoint's evaluation
    full = ray.remote(_full_precision).options(**options).remote(runs[0].model, arch, shared)
    task = ray.remote(_measured).options(**options)
    try:
        return ray.get([task.remote(run.output, arch, shared, full) for run in runs])
    except RayTaskError as error:
        raise error.cause from None


def _full_precision(model: Path, arch: Any, examples: Sequence[Any]) -> Any:
    from qe_dist.flow.evaluate import predictions
    from qe_dist.serve.loading import load_model

    return predictions(load_model(model), arch, examples)


def _measured(checkpoint: Path, arch: Any, examples: Sequence[Any], full: Any) -> Entry:
    from qe_dist.flow.evaluate import evaluate
    from qe_dist.io.checkpoint import read_manifest
    from qe_dist.io.run_dir import RunDir
    from qe_dist.serve.loading import load_model

    quality = evaluate(load_model(checkpoint), arch, examples, full).summary()
    manifest, store = read_manifest(checkpoint), RunDir(checkpoint)
    return Entry(
        recipe=checkpoint.name,
        scheme=scheme_of(manifest["recipe"]["scheme"]),
        bits=manifest["bits_per_weight"],
        active_bits=manifest["active_bits_per_weight"],
        macs=manifest["macs_per_weight"],
        accuracy=quality.get("accuracy"),
        perplexity=quality.get("perplexity"),
        kl=quality["kl"],
        kinds=quality["kinds"],
        fit_seconds=sum(store.block_report(block["index"])["fit_seconds"] for block in manifest["blocks"]),
        fallbacks=len(manifest["fallbacks"]),
    )


def scheme_of(written: str) -> str:
    """The number format that recipes are compared in: bits of weights and activations. Scale groups and kept channels
    are how a recipe fills it, and are in its sizes."""
    from qe_dist.core.scheme import Scheme

    scheme = Scheme.parse(written)
    return f"w{scheme.weight_bits}a{scheme.act_bits or 16}"


def by_scheme(entries: Sequence[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    for scheme in dict.fromkeys(e.scheme for e in entries):
        yield scheme, sorted((e for e in entries if e.scheme == scheme), key=lambda e: e.kl)


def front(entries: Sequence[Entry], size: str) -> list[Entry]:
    """Those that no other one beats at the same size or a smaller one (`bits`, `active_bits` or `macs`)."""

    def key(entry: Entry) -> tuple[float, float]:
        return getattr(entry, size), entry.kl

    best: list[Entry] = []
    for entry in sorted(entries, key=key):
        if not best or entry.kl < best[-1].kl or key(entry) == key(best[-1]):
            best.append(entry)
    return best


HEADER = ("recipe", "bits/weight", "active bits", "multiplications", "accuracy", "perplexity", "KL", "fit s", "wins at")


def cells(entry: Entry, entries: Sequence[Entry]) -> tuple[str, ...]:
    """An entry as a row under HEADER. It wins at a size where no other one is as good for as little."""
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


def table_of(scheme: str, entries: Sequence[Entry]) -> Table:
    table = Table(*HEADER, title=scheme)
    for entry in entries:
        table.add_row(*cells(entry, entries), style="bold" if entry in front(entries, "bits") else None)
    return table


def plot(entries: Sequence[Entry], title: str, path: Path) -> None:
    """Stored bits against KL; the line is what no other recipe beats."""
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


def _folders(names: Sequence[str]) -> dict[str, str]:
    """Recipes by the folders of their checkpoints: a recipe's name; of a file, without folder and ending."""
    from qe_dist.core.errors import ConfigError

    folders: dict[str, str] = {}
    for name in names:
        folder = Path(name).stem if name.endswith(".toml") else name
        if folder in folders:
            raise ConfigError(f"{folders[folder]} and {name} would share the folder {folder}; rename the file")
        folders[folder] = name
    return folders


def _console() -> Console:
    """A pipe has no width; rich would fold the table at 80 columns."""
    return Console(width=None if sys.stdout.isatty() else 200)


def _print_members() -> None:
    from qe_dist import methods
    from qe_dist.methods.recipes import METHODS, SCHEMES, arithmetics

    table = Table("part", "names", title="what recipes are made of")
    table.add_row("whole recipes", ", ".join(METHODS))
    for axis in methods.FOLDERS:
        table.add_row(axis, ", ".join(methods.names(axis)))
    table.add_row("number formats", ", ".join(SCHEMES))
    executed = Table("whole recipes", *SCHEMES, title="what their products execute")
    for row, recipes in arithmetics().items():
        executed.add_row(", ".join(recipes), *row)
    _console().print(table, executed)
