"""Every method on the real models that `make real` builds: development data to choose with, test data to report.

    python benchmarks/quality/league.py lm         writes benchmarks/results/league.json and docs/results/league/*.png
    python benchmarks/quality/league.py vlm

Checkpoints stay in runs/league, and every row is written as soon as it is measured: the same command goes on where an
earlier one stopped. One pass of statistics serves all recipes that rotate alike.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from qe_cluster.launch import ray_cluster
from qe_pipelines.compare import fit
from qe_pipelines.entries import Entry, by_arithmetic, plot
from qe_pipelines.evaluate import encode
from qe_pipelines.measuring import measure
from qe_pipelines.progress import set_up_logging
from qe_pipelines.results import write_result

from qe_dist.flow.config import RunConfig
from qe_dist.methods.recipes import load_recipe

ROOT = Path(__file__).parent.parent.parent
REAL, RESULT = ROOT / "real", ROOT / "benchmarks" / "results" / "league.json"
PLOTS = ROOT / "docs" / "results" / "league"
DATA = {"lm": "text-{}.jsonl", "vlm": "{}.jsonl"}
SETS = ("development", "test")
AT_ONCE = 8
"""Rows that are measured before the result is written."""

CONTROLS = ("rtn-w4a16g64", "gptq-w4a16g64", "gptq-w4a16g32", "gptq-w4a8g64")
A16 = ("awq+gptq-w4a16g64", "gptq+qera-w4a16g64@0.25f4", "lists+gptq+qera-w4a16g64@0.25f4")
INT8 = (
    "gptq+qera-w4a8g64@0.25f4", "lists+gptq+qera-w4a8g64@0.25f4",
    "smoothquant+gptq-w4a6", "hadamard+gptq-w4a6", "serq-w4a6", "aser+gptq-w4a6@0.25", "qe-paper+gptq-w4a6",
    "lists+gptq-w4a6g64", "smoothquant+lists+gptq+qera-w4a6g64@0.5f4", "qe-w4a6g64",
)  # fmt: skip
ROWS = {"lm": (*CONTROLS, *A16, *INT8), "vlm": (*CONTROLS, *A16, *INT8, "mbq+gptq-w4a6", "masquant-w4a6")}


def main(
    model: Annotated[str, typer.Argument(help="lm or vlm, of the folder real/")],
    recipes: Annotated[str, typer.Option(help="comma-separated, names or files of league/; default: all rows")] = "",
    sets: Annotated[str, typer.Option(help="of the data: development, test or both")] = ",".join(SETS),
    first: Annotated[int | None, typer.Option(help="so many samples of each set; default: all")] = None,
    workers: Annotated[int, typer.Option(help="Ray workers")] = 2,
) -> None:
    """Fits and measures the rows that the result does not hold yet."""
    set_up_logging(None)
    names = [part for part in recipes.split(",") if part] or list(ROWS[model])
    folder, output, result = REAL / model, ROOT / "runs" / "league" / model, _read()
    data = {name: REAL / "data" / DATA[model].format(name) for name in ("calibration", *SETS)}
    asked = {Path(name).stem if name.endswith(".toml") else name: load_recipe(name) for name in names}
    runs = {
        name: RunConfig(folder, recipe, data["calibration"], output / name, workers) for name, recipe in asked.items()
    }
    with ray_cluster(None, workers):
        fit(list(runs.values()))
        for kind in sets.split(","):
            rows = result.setdefault(model, {}).setdefault(kind, [])
            missing = [run for name, run in runs.items() if name not in {row["recipe"] for row in rows}]
            for part in (missing[i : i + AT_ONCE] for i in range(0, len(missing), AT_ONCE)):
                rows += [asdict(entry) for entry in measure(part, *encode(folder, beginning(data[kind], first)))]
                write_result(RESULT, {"models": result})
    if "test" in sets:
        draw(model, [Entry(**row) for row in result[model]["test"]])


def beginning(data: Path, count: int | None) -> Path:
    """The first samples of a file, beside it; kinds take turns in it, so these are a fair share."""
    if count is None:
        return data
    part = data.with_name(f"{data.stem}-first-{count}.jsonl")
    part.write_text("".join(data.read_text().splitlines(keepends=True)[:count]))
    return part


def _read() -> dict[str, Any]:
    return json.loads(RESULT.read_text())["models"] if RESULT.exists() else {}


def draw(model: str, entries: Sequence[Entry]) -> None:
    PLOTS.mkdir(parents=True, exist_ok=True)
    for title, own in by_arithmetic(entries):
        plot(own, f"{model}, {title}", PLOTS / f"{model}-{title}.png")


if __name__ == "__main__":
    typer.run(main)
