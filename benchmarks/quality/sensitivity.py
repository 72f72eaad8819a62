"""How much less the loss depends on an image token than on a text token: MBQ's ratio, by a true backward pass.

    python benchmarks/quality/sensitivity.py          writes benchmarks/results/sensitivity.json

For both bundled models, in float32, on the calibration samples that have an image: what `qe-dist sensitivity` measures
(`qe_dist/checkpoint/sensitivity.py`). MBQ divides by the tokens of the answer; the streaming engine cannot tell them
from the prompt's, so the ratio to all text tokens is what `image_weight` of the transform `mbq` stands for.
"""

import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from qe_pipelines.evaluate import encode
from qe_pipelines.results import write_result
from rich.console import Console
from rich.table import Table

from qe_dist.checkpoint.sensitivity import sensitivity
from qe_dist.core.batch import IMAGE
from qe_dist.serve.loading import load_model

ROOT = Path(__file__).parents[2]
MODELS, RESULTS = ROOT / "models", ROOT / "benchmarks" / "results"
OUTPUTS = {"o_proj": "attention", "down_proj": "mlp"}
AGAINST = ("text", "answer")


def measure(folder: Path, calibration: Path) -> dict[str, Any]:
    """The ratios of every block, and their medians."""
    arch, examples = encode(folder, calibration)
    examples = [e for e in examples if bool((e.modality == IMAGE).any())]
    found = sensitivity(load_model(folder).float(), arch, examples)
    rows = [
        {"block": int(place.split()[0]), "output": OUTPUTS[place.rpartition(".")[2]]}
        | {"image / text": text, "image / answer": answer}
        for place, text, answer in zip(found.places, found.image_to_text, found.image_to_answer, strict=True)
    ]
    medians = {f"image / {kind}": median(row[f"image / {kind}"] for row in rows) for kind in AGAINST}
    return {"samples": len(examples), "tokens": dict(found.tokens), "median": medians, "blocks": rows}


def table_of(models: dict[str, Any]) -> Table:
    columns = [f"image / {kind}" for kind in AGAINST]
    table = Table("model", "block", "output", *columns, title="mean |dLoss/dy|")
    for name, result in models.items():
        for row in result["blocks"]:
            table.add_row(name, str(row["block"]), row["output"], *(f"{row[c]:.2f}" for c in columns))
        table.add_row(name, "", "median", *(f"{result['median'][c]:.2f}" for c in columns))
        table.add_section()
    return table


def main() -> None:
    torch.set_num_threads(1)
    calibration = MODELS / "data" / "calibration.jsonl"
    models = {name: measure(MODELS / name, calibration) for name in ("plain", "outlier")}
    Console().print(table_of(models))
    write_result(RESULTS / "sensitivity.json", {"models": models})


if __name__ == "__main__":
    sys.exit(main())
