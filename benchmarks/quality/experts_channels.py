"""Which channels matter for which token: what Quant Experts rests on, measured on what `experts.py` has prepared.

A channel of a token is important if it is among the k with the largest |x_c| mean|W_c| (k as on the layers of the
paper: a 48th of a narrower one). f_c is the share of tokens for which channel c is. Counted on the calibration tokens;
overlaps of two tokens on tokens of the development set.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from experts_model import BlockData, HeldOut
from qe_pipelines.results import write_result
from torch import Tensor

from qe_dist.core.batch import MODALITIES
from qe_dist.methods.base import GroupProblem
from qe_dist.numerics.affinity import top_channels
from qe_dist.numerics.lowrank import capped

ROOT = Path(__file__).parents[2]
RESULT, ROWS = (ROOT / "benchmarks" / "results" / f"{name}.json" for name in ("experts_channels", "experts"))
PICTURE = ROOT / "docs" / "experts.png"
K, EXPERTS = 32, 8
SHOWN = 4
"""Blocks whose curves are kept, from the first to the last."""
BARS = ("shared 32", "qe random routing", "qe sublayer", "qe own", "qe oracle", "shared 288")


def main(what: str, prepared: Mapping[str, Path]) -> None:
    if what == "channels":
        models = json.loads(RESULT.read_text())["models"] if RESULT.exists() else {}
        models |= {name: measured(folder) for name, folder in prepared.items()}
        write_result(RESULT, {"models": models})
    plot(json.loads(RESULT.read_text())["models"], json.loads(ROWS.read_text())["models"])


def measured(folder: Path) -> dict[str, Any]:
    """Facts of every group of every block, and curves of some."""
    files = sorted(folder.glob("block-*.pt"))
    shown = {round(i * (len(files) - 1) / (SHOWN - 1)) for i in range(SHOWN)}
    facts, curves = [], {}
    for index, file in enumerate(files):
        data: BlockData = torch.load(file, weights_only=False)
        for name, problem in data.problems.items():
            facts.append({"block": index, "group": name, **group_facts(problem, data.held_out[name])})
            if index in shown:
                curves[f"{index} {name}"] = group_curves(problem)
    return {"groups": facts, "curves": curves}


def by_modality(problem: GroupProblem) -> dict[str, Tensor]:
    """f_c over the tokens of each modality that there are, and over all. [I] each"""
    stats, counts = problem.stats, problem.stats.top_count[K].double()
    found = {m: counts[i] / stats.count[i] for i, m in enumerate(MODALITIES) if stats.count[i]}
    return {"all": stats.frequency(K), **found}


def group_curves(problem: GroupProblem) -> dict[str, list[float]]:
    """f_c in descending order, until next to nothing is left."""
    width = problem.group.in_features
    found = {name: f.sort(descending=True).values for name, f in by_modality(problem).items()}
    return {name: [round(float(v), 4) for v in f[: width // 3]] for name, f in found.items()}


def group_facts(problem: GroupProblem, held: HeldOut) -> dict[str, Any]:
    width, k = problem.group.in_features, capped(problem.group.in_features, K)
    occurs = top_channels(held.x, problem.stats.importance, k).float()
    frequency = by_modality(problem)
    order = frequency["all"].argsort(descending=True)
    neighbours = ((held.sample[1:] == held.sample[:-1]) & (held.position[1:] == held.position[:-1] + 1)).nonzero()[:, 0]
    facts = {
        "k": k,
        "width": width,
        "always": int((frequency["all"] > 0.5).sum()),  # important for more than half of the tokens
        "shared_share": float(frequency["all"][order[:k]].sum() / k),  # of the places, taken by the k most frequent
        "with_routed_share": float(frequency["all"][order[: k + EXPERTS * k]].sum() / k),
        "next_token": float((occurs[neighbours] * occurs[neighbours + 1]).sum(dim=1).mean() / k),
        "any_token": _pairs(occurs, occurs, k),
    }
    for m, modality in enumerate(MODALITIES):
        if modality in frequency and (held.modality == m).any():
            own = occurs[held.modality == m]
            facts[f"any_{modality}_token"] = _pairs(own, own, k)
    if "image" in frequency and "text" in frequency:
        facts["text_with_image"] = float((frequency["text"] * frequency["image"]).sum() / k)
        top = [frequency[m].argsort(descending=True)[:k] for m in MODALITIES]
        facts["same_shared"] = len(set(top[0].tolist()) & set(top[1].tolist())) / k
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in facts.items()}


def _pairs(one: Tensor, other: Tensor, k: int) -> float:
    """Share of the important channels that two tokens, drawn at random, have in common."""
    return float((one.mean(dim=0) * other.mean(dim=0)).sum() / k)


def layer_errors(rows: Sequence[Mapping[str, Any]], scheme: str) -> dict[str, dict[str, float]]:
    """Mean held-out error over the blocks, over that of one adapter of the same active rank; by row and group."""
    own = {
        r["name"]: r["held_out_error"]
        for r in rows
        if (r["scheme"], r["quantizer"], r["factor_bits"], r["seed"]) == (scheme, "gptq", 16, 0)
    }
    base = own.get("shared 64")
    if base is None:
        return {}
    return {
        name: {g: mean(e / b for e, b in zip(errors[g], base[g], strict=True)) for g in base}
        for name, errors in own.items()
    }


def plot(channels: Mapping[str, Any], models: Mapping[str, Any]) -> None:
    """Curves of a middle block, and how much of a layer's error each way of routing leaves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(channels)), layout="constrained")
    axes = figure.subplots(len(channels), 2, squeeze=False)
    for (left, right), (model, found) in zip(axes, channels.items(), strict=True):
        blocks = sorted({int(name.split()[0]) for name in found["curves"]})
        middle = blocks[len(blocks) // 2]
        for i, (name, curves) in enumerate((n, c) for n, c in found["curves"].items() if n.startswith(f"{middle} ")):
            for modality, style in (("text", "-"), ("image", "--")):
                if modality in curves:
                    label = f"{name.partition(' ')[2]}, {modality}"
                    left.plot(range(1, len(curves[modality]) + 1), curves[modality], style, color=f"C{i}", label=label)
        left.set(title=f"{model}, block {middle}", xlabel="channel, by frequency", ylabel="f_c", xscale="log")
        left.legend(fontsize=7)
        errors = layer_errors(models.get(model, {"rows": []})["rows"], "w4a6")
        bars = [name for name in BARS if name in errors]
        for i, name in enumerate(bars):
            values = list(errors[name].values())
            right.bar([g + 0.8 * i / len(bars) for g in range(len(values))], values, 0.8 / len(bars), label=name)
        if bars:
            right.set_xticks([g + 0.35 for g in range(len(errors[bars[0]]))], errors[bars[0]])
        right.axhline(1, color="0.5", linewidth=0.8)
        right.set(title=f"{model}, w4a6: held-out error over that of shared 64", ylim=(0.6, None))
        right.legend(fontsize=7)
    figure.savefig(PICTURE, dpi=130)
