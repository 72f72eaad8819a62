"""`qe-dist compare`: fits any set of recipes in one pass of the calibration, and shows which is best at which size."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qe_pipelines.cluster import place
from qe_pipelines.console import TO_QUANTIZE, require
from qe_pipelines.entries import Entry, by_arithmetic, plot, table_of
from qe_pipelines.evaluate import encode
from qe_pipelines.measuring import measure
from qe_pipelines.models import Revision, folder_at
from qe_pipelines.progress import run_view, set_up_logging
from qe_pipelines.reading import SOURCE, reads_samples
from qe_pipelines.results import write_result


@reads_samples
def compare(
    model: Annotated[str | None, typer.Argument(help="folder, or name on the Hugging Face hub")] = None,
    recipes: Annotated[str, typer.Option(help="comma-separated names or TOML files, such as rtn-w4a6,qe-w4a6")] = "",
    calibration: Annotated[str | None, typer.Option(help=SOURCE)] = None,
    data: Annotated[
        str | None,
        typer.Option(help="the like, to measure with: choose on development data alone, report on test data"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="directory for a checkpoint of every recipe")] = None,
    revision: Revision = None,
    list_all: Annotated[bool, typer.Option("--list", help="print what recipes are made of, and stop")] = False,
    workers: Annotated[int | None, typer.Option(help="Ray workers; default: as for quantize")] = None,
    ray_address: Annotated[str | None, typer.Option(help="address of a running Ray cluster")] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    reading: Any = None,
) -> None:
    """Fit RECIPES to MODEL, measure what is left of it, and show who wins at which size and against which control.

    OUTPUT gets a checkpoint for each recipe, compare.json with all numbers (of every sample, too), and a plot for each
    arithmetic and number format.
    """
    set_up_logging(None)
    if list_all:
        _print_members()
        return
    from qe_dist.core.errors import ConfigError

    names = list(dict.fromkeys(part.strip() for part in recipes.split(",") if part.strip()))
    if not (model and names and calibration and data and output):
        given = {"MODEL": model, "--recipes": names, "--calibration": calibration, "--data": data, "--output": output}
        missing = [name for name, value in given.items() if not value]
        raise ConfigError(f"compare needs {', '.join(missing)} (or --list alone)")
    require(*TO_QUANTIZE, "matplotlib")
    from qe_cluster import launch

    from qe_dist.checkpoint.quality import too_few
    from qe_dist.flow.config import RunConfig
    from qe_dist.methods.recipes import load_recipe

    loaded = {folder: load_recipe(name) for folder, name in _folders(names).items()}
    folder = folder_at(model, revision)
    encoded = encode(folder, data, reading)  # raises for a faulty sample, before any work
    address, here = place(ray_address, {})
    count = workers or here.workers(1)
    common = {"device": here.device, "seed": seed, "reading": replace(reading, seed=seed)}
    runs = [RunConfig(folder, recipe, calibration, output / name, count, **common) for name, recipe in loaded.items()]
    with launch.ray_cluster(address, count):
        fit(runs)
        entries = measure(runs, *encoded)
    write_result(output / "compare.json", {"model": str(model), "entries": [vars(e) for e in entries]})
    _show(entries, folder.name, output)
    if note := too_few(len(encoded[1])):
        typer.echo(note)


def _show(entries: Sequence[Entry], model: str, output: Path) -> None:
    """Prints the table of each arithmetic and number format, and puts its plot beside the numbers."""
    console = _console()
    for title, own in by_arithmetic(entries):
        console.print(table_of(title, own, entries))
        plot(own, f"{model}, {title}", output / f"{title}.png")
    console.print(f"numbers and plots are in {output}", highlight=False, soft_wrap=True)


def fit(runs: Sequence[Any]) -> None:
    """Makes the checkpoints of all runs. Runs that rotate the model alike share one pass of the calibration."""
    from qe_cluster import driver

    from qe_dist.flow.config import by_rotation

    for together in by_rotation(runs):
        with run_view(quiet=False) as view:
            driver.quantize(*together, listen=view.without_lines())


def _folders(names: Sequence[str]) -> dict[str, str]:
    """The recipes by the names of their checkpoints' folders: a recipe's name, or the stem of its file.

    Raises ConfigError when two would share a folder.
    """
    from qe_dist.core.errors import ConfigError

    folders: dict[str, str] = {}
    for name in names:
        folder = Path(name).stem if name.endswith(".toml") else name
        if folder in folders:
            raise ConfigError(f"{folders[folder]} and {name} would share the folder {folder}; rename the file")
        folders[folder] = name
    return folders


def _console() -> Console:
    """A console that is wide enough for the table in a pipe, which rich would fold at 80 columns."""
    return Console(width=None if sys.stdout.isatty() else 200)


def _print_members() -> None:
    """Prints the parts of recipes, and the arithmetic of each named recipe."""
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
