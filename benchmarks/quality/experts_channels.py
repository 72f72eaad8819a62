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
RESULT, LAYERS = (ROOT / "benchmarks" / "results" / f"{name}.json" for name in ("experts_channels", "experts_layers"))
PICTURE = ROOT / "docs" / "results" / "experts.png"
K, EXPERTS = 32, 8
SHOWN = 4
"""Blocks whose curves are kept, from the first to the last."""
SCHEMES = ("w3a16g64", "w4a6")


def main(what: str, prepared: Mapping[str, Path]) -> None:
    if what == "channels":
        models = json.loads(RESULT.read_text())["models"] if RESULT.exists() else {}
        models |= {name: measured(folder) for name, folder in prepared.items()}
        write_result(RESULT, {"models": models})
    plot(json.loads(RESULT.read_text())["models"], json.loads(LAYERS.read_text())["models"])


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
    """Mean over the blocks of a group's held-out error, over that of one adapter of the same active rank; by row."""
    own = [row["errors"] for row in rows if row["scheme"] == scheme]
    return {
        name: {g: mean(one[name][g] / one["shared 64"][g] for one in own) for g in own[0][name]}
        for name in (own[0] if own else ())
        if name != "shared 64"
    }


def plot(channels: Mapping[str, Any], models: Mapping[str, Any]) -> None:
    """Curves of a middle block, and how much of a layer's error each way of routing leaves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.6 * len(channels)), layout="constrained")
    axes = figure.subplots(len(channels), 1 + len(SCHEMES), squeeze=False)
    for (left, *others), (model, found) in zip(axes, channels.items(), strict=True):
        _draw_curves(left, model, found["curves"])
        for right, scheme in zip(others, SCHEMES, strict=True):
            errors = layer_errors(models.get(model, []), scheme)
            for i, (name, by_group) in enumerate(errors.items()):
                places = [g + 0.8 * i / len(errors) for g in range(len(by_group))]
                right.bar(places, list(by_group.values()), 0.8 / len(errors), label=name)
                right.set_xticks([g + 0.3 for g in range(len(by_group))], [g.partition(".")[2] for g in by_group])
            right.axhline(1, color="0.5", linewidth=0.8)
            right.set(title=f"{model}, {scheme}: held-out error over that of shared 64")
            right.legend(fontsize=7)
    figure.savefig(PICTURE, dpi=110)


def _draw_curves(axes: Any, model: str, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    blocks = sorted({int(name.split()[0]) for name in curves})
    middle = blocks[len(blocks) // 2]
    for i, (name, own) in enumerate((n, c) for n, c in curves.items() if n.startswith(f"{middle} ")):
        for modality, style in (("text", "-"), ("image", "--")):
            if modality in own:
                label = f"{name.partition(' ')[2]}, {modality}"
                axes.plot(range(1, len(own[modality]) + 1), own[modality], style, color=f"C{i}", label=label)
    axes.set(title=f"{model}, block {middle}", xlabel="channel, by frequency", ylabel="f_c", xscale="log")
    axes.legend(fontsize=7)
