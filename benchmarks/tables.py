"""Writes the tables of README.md and docs from benchmarks/results/*.json; quotations and the reference from the code.

python benchmarks/tables.py            rewrites what stands between `<!-- table: NAME -->` or `<!-- file: PATH -->`
                                       and `<!-- end -->`
python benchmarks/tables.py --check    fails where anything of it is stale
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import reference
import schedule
import torch
from qe_pipelines import entries
from qe_pipelines.demo import HEADER, Case, cells
from qe_pipelines.entries import Entry, front

from qe_dist import archs
from qe_dist.core.errors import ConfigError
from qe_dist.methods.recipes import SCHEMES as FORMATS
from qe_dist.methods.recipes import arithmetics, load_recipe
from qe_dist.numerics.intervals import interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "models/README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")))
MARK = re.compile(r"(<!-- table: (?P<name>[^>]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
QUOTE = re.compile(r"(<!-- file: (?P<path>\S+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


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


NOT_MEASURED = "\nNot measured yet.\n"
LEAGUE = (
    "recipe", "format", "bits/weight", "bits read", "MiB", "KL, 95 %", "less that of the control, 95 %", "control",
    "agreement", "perplexity",
)  # fmt: skip


def entries_of(result: dict[str, Any], model: str, kind: str) -> list[Entry]:
    """Of league.json: what was measured on development or test data."""
    known = {field.name for field in fields(Entry)}
    rows = result["models"].get(model, {}).get(kind, [])
    return [Entry(**{name: value for name, value in row.items() if name in known}) for row in rows]


def league(result: dict[str, Any], model: str) -> str:
    """Test data, grouped by what the product executes; a recipe is bold where no other one of its group is as good for
    as few stored bits. The last columns: exact match and KL by modality where there are images, and KL on development
    data."""
    reported = entries_of(result, model, "test")
    if not reported:
        return NOT_MEASURED
    choices = {entry.recipe: f"{entry.kl:.4f}" for entry in entries_of(result, model, "development")}
    with_images = any(entry.accuracy is not None for entry in reported)
    header = (*LEAGUE, *(("exact match", "KL after images", "KL of text") if with_images else ()), "KL, development")
    tables = []
    for arithmetic in sorted({entry.arithmetic for entry in reported}):
        own = sorted((e for e in reported if e.arithmetic == arithmetic), key=lambda e: e.kl)
        best = {entry.recipe for entry in front(own, "bits")}
        rows = [(*league_row(e, reported, e.recipe in best, with_images), choices.get(e.recipe, "")) for e in own]
        tables.append(f"\nProduct in {arithmetic}:\n\n{markdown(header, rows)}")
    return "".join(tables) + source(result, "league")


RECOMMENDED = {
    "small weights, 16-bit products": "qe-w4a16g64",
    "small weights, int8 products": "qe-w4a8g64",
    "activations of 6 bits (int8 products)": "qe-w4a6g64",
    "no repair: for engines without qe_dist": "gptq-w4a16g64",
    "the paper's method, with GPTQ": "qe-paper+gptq-w4a6",
}


def recommended(result: dict[str, Any]) -> str:
    """What to take for what, with what the real model with pictures says of it on test data."""
    reported = {load_recipe(entry.recipe): entry for entry in entries_of(result, "vlm", "test")}
    rows = []
    for purpose, recipe in RECOMMENDED.items():
        # No channel of this model is kept out of a rotation in bands of 8 octaves, so it is measured as one of all.
        wanted = load_recipe(recipe)
        if wanted.rotation is not None:
            wanted = replace(wanted, rotation=replace(wanted.rotation, octaves=0.0))
        entry = reported[wanted]
        exact = f"{entry.accuracy:.1%}"
        rows.append((purpose, f"`{recipe}`", f"{entry.kl:.3f}", exact, f"{entry.bits:.2f}", f"{entry.active_bits:.2f}"))
    header = ("you want", "take", "KL", "exact match", "bits/weight", "bits read")
    return "\n" + markdown(header, rows) + source(result, "league")


def real_peers(result: dict[str, Any]) -> str:
    """Other tools on the real language model's test texts."""
    header = ("tool", "recipe", "bits/weight", "KL, 95 %", "agreement", "perplexity", "CPU seconds", "peak MiB")
    rows = [
        (
            row["side"], row["recipe"], f"{row['bits_per_weight']:.2f}",
            f"{row['quality']['kl']:.4f} [{', '.join(f'{end:.4f}' for end in row['quality']['intervals']['kl'])}]",
            f"{row['quality']['agreement']:.1%}", f"{row['quality']['perplexity']:.2f}",
            f"{sum(row['cpu_seconds'].values()):.0f}", f"{row['peak_mib']:.0f}",
        )
        for row in result["rows"]
    ]  # fmt: skip
    return "\n" + markdown(header, rows) + source(result, "real_peers")


def league_row(entry: Entry, reported: list[Entry], bold: bool, with_images: bool) -> tuple[str, ...]:
    agreement, spread, gap, control = entries.paired(entry, reported)
    name = f"{entry.recipe} (`qe`)" if is_ours(entry.recipe) else entry.recipe
    row = (
        f"**{name}**" if bold else name, entry.scheme, f"{entry.bits:.2f}", f"{entry.active_bits:.2f}",
        f"{entry.mib:.0f}", f"{entry.kl:.4f} {spread}".strip(), gap, control, agreement, f"{entry.perplexity:.2f}",
    )  # fmt: skip
    if not with_images:
        return row
    by_modality = (f"{entry.modalities[name]['kl']:.4f}" for name in ("image", "text"))
    return (*row, "" if entry.accuracy is None else f"{entry.accuracy:.1%}", *by_modality)


def is_ours(recipe: str) -> bool:
    """Whether a recipe's name means what `qe` is in its number format."""
    scheme = recipe.partition("@")[0].rpartition("-")[2]
    try:
        return load_recipe(recipe) == load_recipe(f"qe-{scheme}")
    except ConfigError:  # of a file
        return False


def gptq_peer(result: dict[str, Any]) -> str:
    """Errors are relative to the output; the floor is the FLOPs of the factor and of the updates at GEMM's rate."""
    errors = ("plain_rounding", "ours", "peer")
    header = ("weight", "bits", "group", "order", "RTN", "ours", "peer", "ratio", "CPU s", "peer's", "floor")
    rows = [
        (
            f"{c['outputs']} x {c['inputs']}",
            str(c["bits"]),
            str(c["group_size"] or "row"),
            "by size" if c["act_order"] else "as they lie",
            *(f"{c[name]:.4f}" for name in errors),
            f"{c['ours'] / c['peer']:.4f}",
            f"{c['seconds']:.2f}",
            f"{c['peer_seconds']:.2f}",
            f"{c['gflop'] / result['gflop_per_second']:.2f}",
        )
        for c in result["cases"]
    ]
    return "\n" + markdown(header, rows) + source(result, "gptq_peer")


def sensitivity(result: dict[str, Any]) -> str:
    rows = [
        (model, str(found["samples"]), *(f"{ratio:.2f}" for ratio in found["median"].values()))
        for model, found in result["models"].items()
    ]
    first = next(iter(result["models"].values()))
    return "\n" + markdown(("model", "samples", *first["median"]), rows) + source(result, "sensitivity")


def permutation(result: dict[str, Any]) -> str:
    header = ("group", "tokens", "codes us", "second term us", "read side by side us", "read one by one us", "saved")
    names = ("codes", "term", "contiguous", "scattered")
    rows = [
        (c["group"], str(c["tokens"]), *(f"{c[n]:.1f}" for n in names), f"{c['share']:.2%}") for c in result["cases"]
    ]
    return "\n" + markdown(header, rows) + source(result, "permutation")


def experts(result: dict[str, Any], model: str) -> str:
    """Rows of the experts experiment by number format, with paired intervals against the best adapter of rank 64."""
    found = result["models"].get(model)
    if found is None:
        return NOT_MEASURED
    formats: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in found["rows"]:
        formats[row["scheme"], row["quantizer"], str(row["factor_bits"])].append(row)
    return "".join(_experts_of(rows, found["sets"]) for rows in formats.values()) + source(result, "experts")


ONE_ADAPTER = ("lqer 64", "qera 64", "aser 64", "shared 64")


def _experts_of(rows: list[dict[str, Any]], sets: dict[str, Any]) -> str:
    """The base is chosen on the development set, and compared with on the test set."""
    kl = {(r["name"], r["seed"], n): sum(r["sets"][n]["kl"]) / sum(sets[n]["tokens"]) for r in rows for n in sets}
    adapters = [r for r in rows if r["name"] in ONE_ADAPTER and r["seed"] == 0]
    base = min(adapters, key=lambda r: kl[r["name"], 0, "development"], default=None)
    samples, tokens = len(sets["test"]["tokens"]), torch.tensor(sets["test"]["tokens"], dtype=torch.float64)
    lines = []
    for row in sorted(rows, key=lambda r: kl[r["name"], r["seed"], "test"]):
        own, seed = row["sets"]["test"], f", seed {row['seed']}" if row["seed"] else ""
        against = "" if row is base or base is None else _against(own["kl"], base["sets"]["test"]["kl"], tokens)
        lines.append((
            f"**{row['name']}**" if row is base else row["name"] + seed, f"{row['stored_bits']:.2f}",
            f"{row['active_bits']:.2f}", f"{kl[row['name'], row['seed'], 'development']:.4f}",
            f"{kl[row['name'], row['seed'], 'test']:.4f}", against, f"{sum(own['agrees']) / float(tokens.sum()):.1%}",
            _layer_error(row, base),
        ))  # fmt: skip
    one = rows[0]
    title = f"{one['scheme']}, {one['quantizer'].upper()}, factors of {one['factor_bits']} bits; {samples} test samples"
    header = ("repair", "stored bits", "active bits", "KL, development", "KL, test", "against the adapter in bold")
    return f"\n{title}:\n\n" + markdown((*header, "top-1 agreement", "layer error"), lines)


def _against(own: list[float], base: list[float], tokens: torch.Tensor) -> str:
    """How much larger the KL is, with its 95 % interval."""
    mine, other = torch.tensor(own, dtype=torch.float64), torch.tensor(base, dtype=torch.float64)
    size = float(other.sum() / tokens.sum())
    found = interval(mine, tokens, other)
    spread = "" if found is None else f" [{found[0] / size:+.1%}, {found[1] / size:+.1%}]"
    return f"{float((mine - other).sum() / other.sum()):+.1%}{spread}"


def _layer_error(row: dict[str, Any], base: dict[str, Any] | None) -> str:
    """Mean over all groups of all blocks, over that of the base."""
    if base is None:
        return ""
    pairs = [
        pair
        for name, errors in row["held_out_error"].items()
        for pair in zip(errors, base["held_out_error"][name], strict=True)
    ]
    return f"{mean(own / other for own, other in pairs):.3f}"


def expert_layers(result: dict[str, Any]) -> str:
    """Of each group, the mean over the blocks of its held-out error over that of `shared 64`."""
    rows, header = [], ("model", "format", "blocks", "input of")
    for model, found in result["models"].items():
        for scheme in dict.fromkeys(one["scheme"] for one in found):
            own = [one["errors"] for one in found if one["scheme"] == scheme]
            others = [name for name in own[0] if name != "shared 64"]
            header = (*header[:4], "error of shared 64", *others)
            for group in own[0]["shared 64"]:
                base = [one["shared 64"][group] for one in own]
                ratios = [mean(one[n][group] / b for one, b in zip(own, base, strict=True)) for n in others]
                rows.append((model, scheme, str(len(own)), group, f"{mean(base):.4f}", *(f"{r:.3f}" for r in ratios)))
    return "\n" + markdown(header, rows) + source(result, "experts_layers")


def channel_overlap(result: dict[str, Any]) -> str:
    """Means over the blocks."""
    names = ("k", "width", "always", "shared_share", "with_routed_share", "next_token", "any_token")
    pairs = {"text_with_image": "text with image", "same_shared": "C_s of text and of images in common"}
    rows = []
    for model, found in result["models"].items():
        for group in dict.fromkeys(one["group"] for one in found["groups"]):
            own = [one for one in found["groups"] if one["group"] == group]
            shares = [f"{mean(one[n] for one in own):.2f}" for n in names[3:]]
            others = [f"{mean(one[n] for one in own):.2f}" if n in own[0] else "" for n in pairs]
            counts = [f"{mean(one[n] for one in own):.0f}" for n in names[:3]]
            rows.append((model, group, *counts, *shares, *others))
    header = ("model", "input of", "k", "channels", "important for most tokens", "share of C_s", "of C_s and C_r",
              "shared with the next token", "with any token", *pairs.values())  # fmt: skip
    return "\n" + markdown(header, rows) + source(result, "experts_channels")


def lists_by_class(result: dict[str, Any]) -> str:
    """What is left of the largest squares of held-out tokens; means over the blocks."""
    rows = []
    for model, found in result["models"].items():
        for kind in found[0]["left"]:
            groups = dict.fromkeys(one["group"] for one in found)
            own = {g: [one["left"][kind] for one in found if one["group"] == g] for g in groups}
            own["all"] = [one["left"][kind] for one in found]
            rows.append((model, kind, *(f"{mean(values):.0%}" for values in own.values())))
    header = ("model", f"lists of {result['share']:.0%} of the channels", *groups, "all")
    return "\n" + markdown(header, rows) + source(result, "experts_lists")


def schedules(result: dict[str, Any]) -> str:
    """KL of all seeds together against that of the sequential schedule; times of 30 blocks are projected from the
    processor's seconds of each schedule, without the wait for the first inputs."""
    tokens, seeds = torch.tensor(result["tokens"], dtype=torch.float64), {row["seed"] for row in result["rows"]}
    kl: dict[str, list[float]] = {}
    seconds: dict[str, float] = defaultdict(float)
    for row in result["rows"]:
        kl[row["schedule"]] = [
            a + b for a, b in zip(row["kl"], kl.get(row["schedule"], [0.0] * len(tokens)), strict=True)
        ]
        seconds[row["schedule"]] += sum(row["seconds"].values()) / result["blocks"] / len(seeds)
    rows = []
    for name in sorted(kl, key=lambda name: sum(kl[name])):
        own = [sum(r["kl"]) / float(tokens.sum()) for r in result["rows"] if r["schedule"] == name]
        against = "" if name == "sequential" else _against(kl[name], kl["sequential"], len(seeds) * tokens)
        times = [
            f"{_seconds_of(name, seconds[name], 30, workers):.0f}" if seconds[name] else "" for workers in (1, 2, 8)
        ]
        rows.append((name, *(f"{one:.4f}" for one in own), against, *times))
    header = ("schedule", *(f"KL, seed {seed}" for seed in sorted(seeds)), "against sequential", *(
        f"projected s, {workers}" for workers in ("1 worker", "2 workers", "8 workers")
    ))  # fmt: skip
    return "\n" + markdown(header, rows) + source(result, "schedules")


def _seconds_of(schedule: str, each: float, blocks: int, workers: int) -> float:
    """Time of tuning so many blocks, of which each takes `each` seconds. A worker tunes each `workers`th block."""
    kind, _, count = schedule.rpartition(" ")
    if schedule == "sequential":
        return blocks * each
    if kind == "waves":
        return -(-blocks // int(count)) * -(-int(count) // workers) * each
    if kind != "pipelined":
        return -(-blocks // workers) * each
    ends = [[0.0] * int(count)]  # of each part of each block
    for i in range(blocks):
        now = ends[-workers][-1] if i >= workers else 0.0
        ends.append([now := max(now, before) + each / int(count) for before in ends[-1]])
    return ends[-1][-1]


def comparing(result: dict[str, Any]) -> str:
    header = ("recipes", "workers", "minutes", "largest process, MiB", "all processes, MiB")
    sizes = (f"{result[name]:.0f}" for name in ("largest_process_mib", "peak_mib"))
    row = (str(len(result["recipes"])), str(result["workers"]), f"{result['seconds'] / 60:.0f}", *sizes)
    return "\n" + markdown(header, [row]) + source(result, "comparing")


def sharing(result: dict[str, Any]) -> str:
    rows = [
        (part, *(f"{case['seconds'][k]:.1f}" for k in ("qe", "twelve")), f"{case['ratios']['twelve / qe']:.2f}")
        for part, case in result["cases"].items()
    ]
    header = ("seconds of", "`qe` alone", "twelve recipes", "ratio")
    return "\n" + markdown(header, rows) + source(result, "sharing")


def block(result: dict[str, Any]) -> str:
    """Measured."""
    rows = [
        (name, f"{row['seconds']:.2f}", *(("", "") if not row["floor"] else _beside(row)), _mib(row["peak_bytes"]))
        for name, row in result["parts"].items()
    ]
    rows.append(("all", f"{result['seconds']:.2f}", f"{result['floor']:.2f}", "", _mib(result["peak_bytes"])))
    header = ("part", "seconds", "floor", "x floor", "peak MiB")
    said = f"\nExpected peak: {_mib(result['expected_peak_bytes'])} MiB of tensors.\n"
    return (
        "\n" + markdown(header, rows) + said + source(result, f"block_{'cpu' if result['device'] == 'cpu' else 'cuda'}")
    )


def _beside(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['floor']:.2f}", f"{row['seconds'] / row['floor']:.1f}"


def _mib(count: float) -> str:
    return f"{count / 2**20:.0f}"


def block_predicted(result: dict[str, Any]) -> str:
    """From counted work and rates."""
    names = ("flop", "flop32", "rough", "decomposed")
    rows = [
        (
            name,
            *(f"{row[n] / 1e12:.1f}" if row[n] else "" for n in names),
            f"{row['bytes'] / 1e9:.1f}" if row["bytes"] else "",
            f"{row['calls'] / 1e3:.1f}" if row["calls"] else "",
            f"{row['floor']:.2f}",
            f"{row['seconds']:.2f}",
        )
        for name, row in result["parts"].items()
    ]
    rows.append(("all", *[""] * 6, *(f"{result['total'][n]:.2f}" for n in ("floor", "seconds"))))
    header = ("part", "TFLOP bf16", "float32", "TF32", "decompositions", "GB", "1000 calls", "floor s", "predicted s")
    return "\n" + markdown(header, rows) + source(result, "block_predicted")


def block_memory(result: dict[str, Any]) -> str:
    kinds = ("weights", "statistics", "forward", "fit", "peak")
    sizes = {name: found for name, found in result["memory"].items() if name != "asked"}
    rows = [
        (name, *(f"{found[k] / 1e9:.1f}" for k in kinds), *(str(n) for n in found["blocks"].values()))
        for name, found in sizes.items()
    ]
    devices = next(iter(sizes.values()))["blocks"]
    header = ("block of", *(f"{k} GB" for k in kinds), *(f"blocks in {d}" for d in devices))
    return "\n" + markdown(header, rows) + source(result, "block_predicted")


def scaling(result: dict[str, Any]) -> str:
    """Ours by the number of workers, and beside the peer."""
    rows = [
        (name, *(f"{run['seconds'][key]:.1f}" for key in ("command", "around", "first_batch", "fit")),
         f"{run['predicted']['seconds']:.1f}", f"{run['error']:+.0%}")
        for name, run in result["runs"].items()
    ]  # fmt: skip
    recipe = result["peer"]["recipe"]
    for threads, seconds in result["peer"]["command_seconds"].items():
        rows.append((f"llm-compressor, {recipe}, one process of {threads}", f"{seconds:.1f}", *[""] * 5))
    header = ("run", "seconds", "before and after", "first batch", "fits", "predicted", "error")
    told = ", ".join(f"{value:.2f} {name}" for name, value in result["efficiency"].items())
    floor = result["efficiency_of_independent_processes"]
    return f"\n{markdown(header, rows)}\nEfficiency of two workers: {told}; " + (
        f"of two processes that share nothing but the machine {floor:.2f}.\n" + source(result, "scaling")
    )


def schedule_at_scale(result: dict[str, Any]) -> str:
    rows = [schedule.cells(row) for row in result["rows"]]
    return f"\nPredictions ({result['slower']['source']}):\n\n{markdown(schedule.HEADER, rows)}" + (
        source(result, "schedule")
    )


def chaos(result: dict[str, Any]) -> str:
    """By what else ran, and by what was killed."""
    runs: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for run in sorted(result["runs"], key=lambda run: run["load"]):
        runs[run["load"], run["trial"]["victim"]].append(run)
    rows = []
    for (load, victim), mine in runs.items():
        recoveries = [kill["recovery"] for run in mine for kill in run["struck"] if kill["recovery"] is not None]
        rows.append(
            (
                f"{load} busy processes" if load else "none",
                victim,
                str(len(mine)),
                str(sum(run["kills"] for run in mine)),
                str(sum(run["equal"] for run in mine)),
                str(sum(run["finished_before"] for run in mine)),
                str(sum(len(run["written_again"]) for run in mine)),
                f"{median(recoveries):.0f} ({max(recoveries):.0f})" if recoveries else "",
                f"{mean(len(run['calls']) for run in mine):.1f}",
            )
        )
    header = (
        "beside", "killed", "runs", "kills", "same bytes", "blocks finished before", "of those made again",
        "seconds until work went on: median (longest)", "calls per run",
    )  # fmt: skip
    return "\n" + markdown(header, rows) + source(result, "chaos")


def out_of_core(result: dict[str, Any]) -> str:
    """Peaks of memory, and what kinds of processes had of them."""
    floor = result["narrow"]["peak_without_embedder_mib"]
    rows = [
        (
            str(run["shape"]["blocks"]),
            run["recipe"],
            f"{run['checkpoint_mib']:.0f}",
            f"{run['peak_mib']:.0f}",
            f"{floor + run['held_mib']:.0f}",
            f"{run['checkpoint_mib'] / run['peak_mib']:.2f}",
            f"{run['seconds']:.0f}",
        )
        for run in (*result["depth"], *result["large"])
    ]
    header = ("blocks", "recipe", "checkpoint MiB", "peak MiB", "floor MiB", "checkpoint / peak", "seconds")
    said = f"\nPeaks over depth lie within {result['spread']:.1%}.\n"
    return "\n" + markdown(header, rows) + said + source(result, "out_of_core")


def hosts(result: dict[str, Any]) -> str:
    """Both cases."""
    rows = [
        (
            name,
            f"{case['seconds']:.0f}",
            str(len(case["calls"])),
            f"{sum(ways['sent'] for ways in case['traffic'].values()) / 2**20:.1f}",
            "yes" if case["equal"] else "NO",
        )
        for name, case in result["cases"].items()
    ]
    wire = result["network"]
    said = f"\nRound trip {wire['measured_round_trip_ms']:.1f} ms, {wire['measured_mbit']:.0f} Mbit/s.\n"
    header = ("case", "seconds", "calls of the command", "MiB sent", "same bytes")
    return "\n" + markdown(header, rows) + said + source(result, "hosts")


def kernel_targets(result: dict[str, Any]) -> str:
    """What the kernels were to reach on the 72B model's linears, and did."""
    rows = [
        (
            target["name"],
            f"{'at least' if target['at_least'] else 'at most'} {target['wanted']:.2f}",
            "not run" if target["found"] is None else f"{target['found']:.2f}",
            {None: "", True: "yes", False: "NO"}[target["met"]],
        )
        for target in result["targets"]
    ]
    return "\n" + markdown(("target", "wanted", "measured", "met"), rows) + _device(result)


def kernel_times(result: dict[str, Any], model: str) -> str:
    """Of whole linears in microseconds, the fraction of the floor behind them; peers have no branches."""
    cells: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
    for row in result["rows"]:
        if row["model"] == model and row["part"] != "linear":
            part = "" if row["part"] == "whole" else f" {row['part']}"
            name = "bf16" if row["part"] == "torch" else f"{row['format']} {row['repair']}{part}"
            cells[row["layer"], row["tokens"]][name] = (
                f"{row['seconds'] * 1e6:.1f} ({row['floor'] / row['seconds']:.0%})"
            )
    names = list(dict.fromkeys(name for row in cells.values() for name in row))
    rows = [(layer, str(tokens), *(row.get(n, "") for n in names)) for (layer, tokens), row in cells.items()]
    return "\n" + markdown(("layer", "M", *names), rows) + _device(result)


def answers_on_gpu(result: dict[str, Any]) -> str:
    """Greedy answers of the kernels that the plain formula would have given."""
    rows = [(name, f"{row['same']} of {row['questions']}") for name, row in result["answers"].items()]
    return "\n" + markdown(("recipe", "answers equal"), rows) + source(result, "generate_cuda")


def steps_on_gpu(result: dict[str, Any]) -> str:
    """Tokens per second through the blocks, the fraction of the floor behind them."""
    rows = []
    for name, row in result["speed"].items():
        for how, seconds in row.items():
            if how != "bytes":
                floor = row["bytes"] / result["rates"]["bytes"]
                cells = (f"{int(count) / spent:.0f} ({floor / spent:.0%})" for count, spent in seconds.items())
                rows.append((name, how, *cells))
    header = ("recipe", "run by", *(f"{count} tokens at a time" for count in result["tokens"]))
    return "\n" + markdown(header, rows) + f"\n{result['device']}.\n" + source(result, "generate_cuda")


def _device(result: dict[str, Any]) -> str:
    rates = result["rates"]
    peers = "; ".join(f"{name} {said}" for name, said in result["peers"].items())
    said = (
        f"\n{result['device']}: {rates['bytes'] / 1e12:.2f} TB/s, {rates['flop16'] / 1e12:.0f} TFLOP/s in bf16, "
        f"{rates['flop8'] / 1e12:.0f} TOP/s in int8. Peers: {peers}.\n"
    )
    return said + source(result, "kernels_cuda")


def kernels_aot(result: dict[str, Any]) -> str:
    """What ptxas made of all builds, the worst of each kernel and architecture."""
    builds: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for build in result["builds"]:
        builds[build["kernel"], build["capability"]].append(build)
    rows = [
        (
            kernel,
            f"{capability / 10:.1f}",
            str(len(mine)),
            *(str(max(build[key] for build in mine)) for key in ("registers", "spills")),
            f"{max(build['shared'] for build in mine) / 1024:.1f}",
        )
        for (kernel, capability), mine in builds.items()
    ]
    header = ("kernel", "sm", "builds", "registers, at most", "spills", "shared KiB, at most")
    return f"\nTriton {result['triton']}:\n\n{markdown(header, rows)}" + source(result, "kernels_aot")


def linear_aot(result: dict[str, Any]) -> str:
    """Each build of the linear: the tile is N x M x K."""
    rows = [
        (
            build["case"],
            f"{build['warps']}/{build['stages']}",
            str(build["registers"]),
            f"{build['shared'] / 1024:.1f}",
            "yes" if build["weights_from_registers"] else "",
        )
        for build in result["builds"]
        if build["kernel"] == "linear"
    ]
    header = ("linear", "warps/stages", "registers", "shared KiB", "WGMMA takes weights from registers")
    return "\n" + markdown(header, rows) + source(result, "kernels_aot")


def hazards(result: dict[str, Any]) -> str:
    """Products for Hopper, without and with the wait behind each of them."""

    def places(numbers: dict[str, Any]) -> str:
        return f"{numbers['hazards']['main loop']} + {numbers['hazards']['elsewhere']}"

    def weight(numbers: dict[str, Any]) -> str:
        return "" if numbers["per_weight"] is None else f"{numbers['per_weight']:.2f}"

    rows = []
    for n in result["builds"]:
        if b := n["unfinished"]:
            rows.append(
                (
                    f"{n['kernel']} {n['case']}",
                    f"{places(b)} → {places(n)}",
                    *(f"{b[key]} → {n[key]}" for key in ("registers", "spills", "instructions")),
                    f"{weight(b)} → {weight(n)}" if weight(n) else "",
                    f"{b['shared'] / 1024:.0f} → {n['shared'] / 1024:.0f}",
                )
            )
    header = (
        "build", "hazards: main loop + elsewhere", "registers", "spills", "instructions of the main loop",
        "per weight", "shared KiB",
    )  # fmt: skip
    every = result.get("every")
    said = f"\nTriton {result['triton']}, ptxas {result['ptxas']}."
    if every:
        said += (
            f" All {every['builds']} tiles that can be chosen for Hopper: {every['with hazards']} with hazards, "
            f"{every['with spills']} with spills."
        )
    return f"{said}\n\n{markdown(header, rows)}" + source(result, "kernels_aot")


def python_per_group(result: dict[str, Any]) -> str:
    rows = [
        (row["group"], f"{row['before']:.0f}", f"{row['microseconds']:.0f}", f"{row['ratio']:.1f}")
        for row in result["rows"]
    ]
    header = ("group of one stacked linear", "before, μs", "now, μs", "ratio")
    return "\n" + markdown(header, rows) + source(result, "python_per_group")


def serving_load(result: dict[str, Any]) -> str:
    rounds = result["rounds"]
    rows = [
        (
            str(index),
            f"{one['seconds']:.0f}",
            f"{one['good']}",
            f"{one['other_questions']} + {one['other_stories']}",
            f"{one['cancelled']}",
            f"{sum(one['refused'].values())} ({', '.join(sorted(one['refused']))})",
            f"{len(one['unclear'])}",
            f"{sum(one['left'].values()):g}",
            f"{one['mib']:.0f}",
        )
        for index, one in enumerate(rounds, 1)
    ]
    header = (
        "round", "seconds", "answered", "otherwise than alone (questions + stories)", "cancelled", "refused (status)",
        "not refused clearly", "still held after it", "MiB of the server",
    )  # fmt: skip
    return "\n" + markdown(header, rows) + source(result, "serving_load")


def agreement(result: dict[str, Any]) -> str:
    rows = [
        (
            recipe,
            ranks,
            f"{one['questions']} of {result['questions']}",
            f"{one['stories']} of {result['stories']}",
            f"{one['mean_logprob']:.5f}",
            f"{one['accuracy']:.1%}",
        )
        for recipe, found in result["rows"].items()
        for ranks, one in found.items()
    ]
    header = ("recipe", "ranks", "answers equal", "stories equal", "log-probability off, mean", "accuracy")
    return "\n" + markdown(header, rows) + source(result, "agreement")


def versions(result: dict[str, Any]) -> str:
    rows = [
        (version.replace("==", " "), str(case["passed"]), str(case["skipped"]), ", ".join(case["failed"]) or "none")
        for version, case in result["cases"].items()
    ]
    header = ("package", "tests passed", "skipped", "failed")
    return "\n" + markdown(header, rows) + source(result, "versions")


def families(result: dict[str, Any]) -> str:
    """Of every family that the code has; `-` where nothing was run."""
    columns = ("streamed", "quantized", "verified", "transformers", "vLLM names", "vLLM TP 1", "vLLM TP 2")

    def cell(name: str, column: str) -> str:
        passed, ran = result["families"].get(name, {}).get(column, (0, 0))
        return "-" if not ran else "yes" if passed == ran else f"{passed} of {ran}"

    def lines(name: str) -> str:
        return str(len((ROOT / f"qe_dist/archs/{name}.py").read_text().splitlines()))

    rows = [(f"`{n}`", lines(n), *(cell(n, column) for column in columns), "no") for n in archs.names()]
    return "\n" + markdown(("family", "lines", *columns, "video"), rows) + source(result, "families")


def exports(result: dict[str, Any]) -> str:
    def shown(row: dict[str, Any], kind: str) -> str:
        found = row.get(kind)
        if "no repair" in row.get(f"{kind}_refused", ""):
            return "no repair"
        return "refused" if found is None else f"{100 * found['accuracy']:.1f} / {found['kl']:.4f}"

    rows = [(row["recipe"], *(shown(row, kind) for kind in ("whole", "base", "lora"))) for row in result["rows"]]
    header = ("accuracy, % / KL from full precision", "our checkpoint", "`--base-only`", "`--peft`, with its LoRA")
    return "\n" + markdown(header, rows) + source(result, "exports")


def arithmetic() -> str:
    """Of every whole recipe, as `qe-dist compare --list` has it."""
    rows = [(", ".join(f"`{name}`" for name in recipes), *row) for row, recipes in arithmetics().items()]
    return "\n" + markdown(("whole recipes", *(f"`{scheme}`" for scheme in FORMATS)), rows)


TABLES: dict[str, tuple[str | None, Callable[..., str], tuple[str, ...]]] = {
    "arithmetic": (None, arithmetic, ()),
    "commands": (None, reference.commands, ()),
    "members": (None, reference.members, ()),
    "whole recipes": (None, reference.whole, ()),
    "demo plain": ("demo", demo, ("plain",)),
    "demo outlier": ("demo", demo, ("outlier",)),
    "pipeline": ("pipeline", pipeline, ()),
    "channels": ("channels", channels, ()),
    "models": ("models", training, ()),
    "sharing": ("sharing", sharing, ()),
    "block cpu": ("block_cpu", block, ()),
    "block cuda": ("block_cuda", block, ()),
    "block predicted": ("block_predicted", block_predicted, ()),
    "block memory": ("block_predicted", block_memory, ()),
    "chaos": ("chaos", chaos, ()),
    "out of core": ("out_of_core", out_of_core, ()),
    "hosts": ("hosts", hosts, ()),
    "scaling": ("scaling", scaling, ()),
    "schedule": ("schedule", schedule_at_scale, ()),
    "kernel targets": ("kernels_cuda", kernel_targets, ()),
    "kernel times 72B": ("kernels_cuda", kernel_times, ("72B",)),
    "kernel times 7B": ("kernels_cuda", kernel_times, ("7B",)),
    "answers on a GPU": ("generate_cuda", answers_on_gpu, ()),
    "steps on a GPU": ("generate_cuda", steps_on_gpu, ()),
    "kernels aot": ("kernels_aot", kernels_aot, ()),
    "versions": ("versions", versions, ()),
    "linear aot": ("kernels_aot", linear_aot, ()),
    "hazards": ("kernels_aot", hazards, ()),
    "hazards triton 3.6": ("kernels_aot_36", hazards, ()),
    "python per group": ("python_per_group", python_per_group, ()),
    "agreement": ("agreement", agreement, ()),
    "serving load": ("serving_load", serving_load, ()),
    "exports": ("exports", exports, ()),
    "families": ("families", families, ()),
    "league lm": ("league", league, ("lm",)),
    "league vlm": ("league", league, ("vlm",)),
    "recommended": ("league", recommended, ()),
    "real peers": ("real_peers", real_peers, ()),
    "gptq_peer": ("gptq_peer", gptq_peer, ()),
    "sensitivity": ("sensitivity", sensitivity, ()),
    "experts lm": ("experts", experts, ("lm",)),
    "experts vlm": ("experts", experts, ("vlm",)),
    "experts layers": ("experts_layers", expert_layers, ()),
    "experts channels": ("experts_channels", channel_overlap, ()),
    "comparing": ("comparing", comparing, ()),
    "lists by class": ("experts_lists", lists_by_class, ()),
    "schedules": ("schedules", schedules, ()),
    "permutation": ("permutation", permutation, ()),
}


def rendered(text: str) -> str:
    def table(match: re.Match[str]) -> str:
        file, render, arguments = TABLES[match["name"]]
        if file is None:  # of the code, not of a result
            return match[1] + render(*arguments) + "\n" + match[4]
        path = RESULTS / f"{file}.json"
        if not path.exists():
            return match[0]
        return match[1] + render(json.loads(path.read_text()), *arguments) + "\n" + match[4]

    def quote(match: re.Match[str]) -> str:
        return f"{match[1]}\n```python\n{(ROOT / match['path']).read_text()}```\n\n{match[4]}"

    return QUOTE.sub(quote, MARK.sub(table, text))


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
