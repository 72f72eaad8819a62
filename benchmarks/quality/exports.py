"""What exports for other engines lose: our checkpoints and what `qe-dist export` makes of them, measured alike.

    python benchmarks/quality/exports.py [--model models/outlier]

All in transformers, which computes the LoRA as PEFT does: base + B A, after compressed-tensors has unpacked the base.
KL is that from the full-precision model. Writes benchmarks/results/exports.json.
"""

import json
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch
from qe_pipelines.evaluate import encode
from qe_pipelines.results import write_result
from safetensors.torch import load_file

from qe_dist.checkpoint.evaluate import evaluate, save_reference
from qe_dist.checkpoint.export import ADAPTER, export
from qe_dist.core.errors import ConfigError
from qe_dist.flow.config import RunConfig, by_rotation
from qe_dist.flow.local import quantize
from qe_dist.methods.recipes import load_recipe
from qe_dist.serve.loading import load_model

ROOT = Path(__file__).parents[2]
DATA = ROOT / "models" / "data"
RECIPES = (
    "rtn-w4a16g64", "awq-w4a16g64", "qera-w4a16g64", "aser-w4a16g64", "serq-w4a16g64", "qe-w4a16g64", "rtn-w4a8",
    "smoothquant-w4a8", "qe-w4a8", "qe-w4a6", "qe-w4a4",
)  # fmt: skip


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "outlier")
    model = parser.parse_args().model
    arch, examples = encode(model, DATA / "evaluation.jsonl")
    rows = []
    with tempfile.TemporaryDirectory() as made:
        full = save_reference(load_model(model), arch, examples, Path(made) / "reference")

        def quality(loaded: Any) -> dict[str, float]:
            told = evaluate(loaded, arch, examples, full).summary()
            return {name: told[name] for name in ("accuracy", "kl")} | {
                "perplexity": told["kinds"]["text"]["perplexity"]
            }

        runs = {n: RunConfig(model, load_recipe(n), DATA / "calibration.jsonl", Path(made) / n) for n in RECIPES}
        for together in by_rotation(list(runs.values())):
            quantize(*together)
        for name, run in runs.items():
            row: dict[str, Any] = {"recipe": name, "whole": quality(load_model(run.output))}
            for kind, peft in (("base", False), ("lora", True)):
                output = Path(made) / f"{name}-{kind}"
                try:
                    export(run.output, output, peft)
                except ConfigError as error:
                    row[f"{kind}_refused"] = str(error).replace(made, "")
                    continue
                loaded = load_model(output)
                row[kind] = quality(repaired(loaded, output, examples[0], arch) if peft else loaded)
            rows.append(row)
            print(json.dumps(row), flush=True)
    write_result(ROOT / "benchmarks" / "results" / "exports.json", {"model": model.name, "rows": rows})


def repaired(model: Any, folder: Path, example: Any, arch: Any) -> Any:
    """With the LoRA in its weights, which compressed-tensors unpacks when the model first runs."""
    with torch.no_grad():
        model(**{k: v.to(model.device) for k, v in arch.model_inputs([example], pad=0).items()})
    tensors = load_file(folder / ADAPTER / "adapter_model.safetensors")
    for name in (n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")):
        weight = model.get_submodule(name.removeprefix("base_model.model.")).weight
        down, up = (tensors[f"{name}.lora_{x}.weight"].to(weight) for x in "AB")
        weight.data += up @ down
    return model


if __name__ == "__main__":
    main()
