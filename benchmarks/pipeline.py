"""Where the time and memory of a run go, beside the floor that no version can beat.

    python benchmarks/pipeline.py            writes benchmarks/results/pipeline.json

Two cases: the bundled outlier model with 1 and with 2 workers, and one block of random weights at the width of
Qwen2-VL-2B (hidden 1536, intermediate 8960). The floor of a stage is its FLOPs at the float32 matrix rate that
one thread of this machine reaches, and the model's bytes at the rate at which this machine reads a file.
"""

import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from qe_cluster import driver
from qe_cluster.launch import ray_cluster
from qe_pipelines.progress import set_up_logging
from qe_pipelines.results import write_result
from rich.console import Console
from rich.table import Table

from qe_dist import archs
from qe_dist.core.spec import BlockSpec
from qe_dist.flow.config import RunConfig
from qe_dist.io.weights import SafetensorsSource
from qe_dist.methods.recipes import load_recipe

ROOT = Path(__file__).parent.parent
MODELS, RESULTS = ROOT / "models", ROOT / "benchmarks" / "results"


def matmul_rate(size: int = 1024, repeats: int = 10) -> float:
    """FLOP/s of one thread in float32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a = torch.randn(size, size)
    a @ a
    start = time.perf_counter()
    for _ in range(repeats):
        a @ a
    rate = repeats * 2 * size**3 / (time.perf_counter() - start)
    torch.set_num_threads(threads)
    return rate


def read_rate(folder: Path) -> tuple[int, float]:
    """(bytes of the weights, bytes per second at which they are read; the page cache may help)."""
    files = list(folder.glob("*.safetensors"))
    start = time.perf_counter()
    size = sum(len(f.read_bytes()) for f in files)
    return size, size / (time.perf_counter() - start)


def forward_flops(block: BlockSpec, tokens: int) -> float:
    """Of the linears; attention over short samples adds little."""
    return 2.0 * tokens * block.num_weights


def gram_flops(block: BlockSpec, tokens: int) -> float:
    return 2.0 * tokens * sum(g.in_features**2 for g in block.groups)


def measure(run: RunConfig) -> dict[str, Any]:
    """One run on Ray: seconds and memory of its stages beside their floors."""
    shutil.rmtree(run.output, ignore_errors=True)
    source = SafetensorsSource(run.model)
    blocks = archs.for_config(source.config).spec(source).blocks
    rate, (size, reading) = matmul_rate(), read_rate(run.model)
    with ray_cluster(None, run.workers):
        summary = driver.quantize(run)
    busy = {k: sum(s[k] for s in summary.stages) for k in ("load", "forward", "fit")}
    flops = sum(forward_flops(b, summary.tokens) + gram_flops(b, summary.tokens) for b in blocks)
    floors = {"load": size / reading, "forward": flops / rate}
    return {
        "workers": run.workers,
        "blocks": len(blocks),
        "weights": sum(b.num_weights for b in blocks),
        "tokens": summary.tokens,
        "seconds": summary.seconds,
        "busy_seconds": busy,
        "floor_seconds": floors,
        "tokens_per_second": summary.tokens / busy["forward"],
        "peak_mib_per_worker": max(s["peak_mib"] for s in summary.stages),
        "bytes_read": size,
        "flops": flops,
        "flops_per_second_of_a_thread": rate,
    }


def block_of_2b(folder: Path) -> Path:
    """One block at Qwen2-VL-2B's width with random weights; the bundled tokenizer and image processor."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = json.loads((MODELS / "plain" / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 1, "layer_types": ["full_attention"],
        "num_attention_heads": 12, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    config["vision_config"] |= {"depth": 1, "hidden_size": 1536}
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config)).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copyfile(MODELS / "plain" / name, folder / name)
    return folder


def table_of(cases: dict[str, dict[str, Any]]) -> Table:
    table = Table("case", "stage", "seconds", "floor", "x floor", "tokens/s", "peak MiB")
    for name, case in cases.items():
        for stage, seconds in case["busy_seconds"].items():
            floor = case["floor_seconds"].get(stage)
            cells = ("", "") if floor is None else (f"{floor:.2f}", f"{seconds / floor:.1f}")
            speed = f"{case['tokens_per_second']:.0f}" if stage == "forward" else ""
            table.add_row(name, stage, f"{seconds:.1f}", *cells, speed, "")
        table.add_row(name, "whole run", f"{case['seconds']:.1f}", "", "", "", f"{case['peak_mib_per_worker']:.0f}")
        table.add_section()
    return table


def main() -> None:
    set_up_logging(None)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        calibration = MODELS / "data" / "calibration.jsonl"
        bundled = RunConfig(MODELS / "outlier", load_recipe("qe-w4a6"), calibration, work / "one")
        wide = replace(bundled, model=block_of_2b(work / "2b"), output=work / "2b-out")
        cases = {
            "bundled, 1 worker": measure(bundled),
            "bundled, 2 workers": measure(replace(bundled, output=work / "two", workers=2)),
            "one 2B block, 1 worker": measure(wide),
        }
    Console().print(table_of(cases))
    one, two = (cases[f"bundled, {n}"]["seconds"] for n in ("1 worker", "2 workers"))
    print(f"two workers take {two / one:.2f} of the time of one")
    write_result(RESULTS / "pipeline.json", {"cases": cases, "two_workers_over_one": two / one})


if __name__ == "__main__":
    sys.exit(main())
