"""Writes the tables of README.md and docs from benchmarks/results/*.json, so that no number is typed.

python benchmarks/tables.py            rewrites what stands between `<!-- table: NAME -->` and `<!-- end -->`
python benchmarks/tables.py --check    fails where a table is stale
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qe_pipelines.demo import HEADER, Case, cells

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "models/README.md")
MARK = re.compile(r"(<!-- table: (?P<name>[^>]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def source(result: dict[str, Any], name: str) -> str:
    e = result["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in e["versions"].items() if v and k in ("torch", "ray", "transformers"))
    return f"\n<sub>{name}.json: {e['command']}, commit {e['commit']}, {e['date']}, {e['machine']}; {versions}</sub>\n"


def demo(result: dict[str, Any], model: str) -> str:
    cases = [Case(**c) for c in result["cases"]]
    rows = [cells(case, cases) for case in cases if case.model == model]
    return f"\nThe {model} model:\n\n" + markdown(HEADER, rows) + source(result, "demo")


def pipeline(result: dict[str, Any]) -> str:
    rows = []
    for name, case in result["cases"].items():
        for stage, seconds in case["busy_seconds"].items():
            floor = case["floor_seconds"].get(stage)
            beside = ("", "") if floor is None else (f"{floor:.2f}", f"{seconds / floor:.1f}")
            speed = f"{case['tokens_per_second']:.0f}" if stage == "forward" else ""
            rows.append((name, stage, f"{seconds:.1f}", *beside, speed, ""))
        rows.append((name, "whole run", f"{case['seconds']:.1f}", "", "", "", f"{case['peak_mib_per_worker']:.0f}"))
    header = ("case", "stage (summed over workers)", "seconds", "floor", "x floor", "tokens/s", "peak MiB per worker")
    ratio = f"\nTwo workers on two cores take {result['two_workers_over_one']:.2f} of the time of one.\n"
    return "\n" + markdown(header, rows) + ratio + source(result, "pipeline")


def channels(result: dict[str, Any]) -> str:
    rows = []
    for model, groups in result["models"].items():
        rows += [(model, g, *(f"{v:.1f}" for v in numbers.values())) for g, numbers in groups.items()]
    first = next(iter(next(iter(result["models"].values())).values()))
    return "\n" + markdown(("model", "input of", *first), rows) + source(result, "channels")


def training(result: dict[str, Any]) -> str:
    rows = [
        (model, *(f"{v:.1%}" if k != "perplexity" else f"{v:.3f}" for k, v in numbers.items()))
        for model, numbers in result["models"].items()
    ]
    first = next(iter(result["models"].values()))
    return "\n" + markdown(("model", *first), rows) + source(result, "models")


TABLES: dict[str, tuple[str, Callable[..., str], tuple[str, ...]]] = {
    "demo plain": ("demo", demo, ("plain",)),
    "demo outlier": ("demo", demo, ("outlier",)),
    "pipeline": ("pipeline", pipeline, ()),
    "channels": ("channels", channels, ()),
    "models": ("models", training, ()),
}


def rendered(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        file, render, arguments = TABLES[match["name"]]
        path = RESULTS / f"{file}.json"
        if not path.exists():
            return match[0]
        return match[1] + render(json.loads(path.read_text()), *arguments) + "\n" + match[4]

    return MARK.sub(replace, text)


def main() -> None:
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text()
        after = rendered(before)
        if after != before:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(after)
    if stale and "--check" in sys.argv:
        sys.exit(f"stale tables in {', '.join(stale)}: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
