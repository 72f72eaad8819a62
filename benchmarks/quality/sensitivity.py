"""How much less the loss depends on an image token than on a text token: MBQ's ratio, by a true backward pass.

    python benchmarks/quality/sensitivity.py          writes benchmarks/results/sensitivity.json

For both bundled models, in float32: the loss of the answers of every calibration sample with an image, and the mean
|dLoss/dy| of the outputs of attention (o_proj) and of the MLP (down_proj) of every block, by kind of token. MBQ divides
by the tokens of the answer; the streaming engine cannot tell them from the prompt's, so the ratio to all text tokens
is what `image_weight` of the transform `mbq` stands for (methods.md section 5.1).
"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from qe_pipelines.results import write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qe_dist import archs
from qe_dist.core.batch import IMAGE, TEXT
from qe_dist.core.sample import Example
from qe_dist.io.samples import load_images, read_samples
from qe_dist.serve.loading import load_model

ROOT = Path(__file__).parents[2]
MODELS, RESULTS = ROOT / "models", ROOT / "benchmarks" / "results"
OUTPUTS = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
AGAINST = ("text", "answer")


class Gradients:
    """Sums of |dLoss/dy| over the tokens of each kind, gathered by hooks on the outputs of some modules."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.kinds: dict[str, Tensor] = {}
        self.sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.counts: dict[str, int] = defaultdict(int)
        for name, module in modules.items():
            module.register_full_backward_hook(lambda _m, _i, out, name=name: self._add(name, out[0]))

    def of_sample(self, kinds: dict[str, Tensor]) -> None:
        """Tells which tokens of the sample that comes next are of each kind."""
        self.kinds = kinds
        for kind, chosen in kinds.items():
            self.counts[kind] += int(chosen.sum())

    def _add(self, name: str, gradient: Tensor) -> None:
        for kind, chosen in self.kinds.items():
            self.sums[name][kind] += float(gradient[0, chosen].abs().mean(dim=1).double().sum())

    def ratio(self, name: str, kind: str) -> float:
        """Mean of an image token over mean of a token of this kind."""
        image, other = (self.sums[name][k] / self.counts[k] for k in ("image", kind))
        return image / other


def measure(folder: Path, calibration: Path) -> dict[str, Any]:
    """The ratios of every block, and their medians."""
    model = load_model(folder).float()
    arch = archs.get("qwen2_vl")
    encoder = arch.encoder(folder)
    blocks = model.get_decoder().layers
    places = {f"{i} {k}": b.get_submodule(m) for i, b in enumerate(blocks) for k, m in OUTPUTS.items()}
    gradients = Gradients(places)
    samples = [s for s in read_samples(calibration) if s.images]
    for sample in samples:
        example = encoder(sample, load_images(sample))
        gradients.of_sample(kinds_of(example))
        inputs = {k: v.to(model.device) for k, v in arch.model_inputs([example], pad=0).items()}
        model(**inputs, labels=example.labels[None].to(model.device), use_cache=False).loss.backward()
        model.zero_grad()
    rows = [
        {"block": i, "output": k} | {f"image / {kind}": gradients.ratio(f"{i} {k}", kind) for kind in AGAINST}
        for i in range(len(blocks))
        for k in OUTPUTS
    ]
    medians = {f"image / {kind}": median(row[f"image / {kind}"] for row in rows) for kind in AGAINST}
    return {"samples": len(samples), "tokens": dict(gradients.counts), "median": medians, "blocks": rows}


def kinds_of(example: Example) -> dict[str, Tensor]:
    return {
        "image": example.modality == IMAGE,
        "text": example.modality == TEXT,
        "answer": example.labels != -100,
    }


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
