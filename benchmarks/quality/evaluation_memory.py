"""What `qe-dist eval` adds to the memory of a process that holds a model, at the vocabulary of Qwen2-VL.

    python benchmarks/quality/evaluation_memory.py    writes benchmarks/results/evaluation_memory.json

A random Qwen2-VL of two blocks and 152,064 tokens is compared with another one, whose head is its own; each number of
samples in a process of its own. What is added is the peak of resident memory (VmHWM, reset once the model is loaded)
less what was resident then. One matrix of log-probabilities of the larger set would be several GiB.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from qe_pipelines.evaluate import encode
from qe_pipelines.results import write_result

from qe_dist import archs
from qe_dist.checkpoint.evaluate import evaluate, save_reference
from qe_dist.checkpoint.memory import BOUND_BYTES
from qe_dist.serve.loading import load_model

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
VOCABULARY, WIDTH = 152_064, 512
TEXT_WORDS = 80
SAMPLES = (8, 32)
MIB = 2**20


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        from tests.tiny import tiny_model

        for seed in (0, 1):
            tiny_model(folder / str(seed), seed=seed, config=config())
        rows = [measured(folder, samples) for samples in SAMPLES]
    result = {"vocabulary": VOCABULARY, "width": WIDTH, "bound_mib": BOUND_BYTES / MIB, "rows": rows}
    write_result(ROOT / "benchmarks" / "results" / "evaluation_memory.json", result)


def config() -> dict[str, Any]:
    made = copy.deepcopy(dict(archs.get("qwen2_vl").tiny))
    made["text_config"] |= {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH}
    made["text_config"] |= {"num_attention_heads": 8, "rope_parameters": made["text_config"]["rope_parameters"] | {
        "mrope_section": [8, 12, 12]
    }}  # fmt: skip
    made["vision_config"] |= {"hidden_size": WIDTH}
    return made


def measured(folder: Path, samples: int) -> dict[str, Any]:
    """One row, from the last line that a process of its own prints."""
    data = folder / f"{samples}.jsonl"
    word = "The sun is a star, and the moon is not. "
    lines = [json.dumps({"text": f"{i} " + word * (TEXT_WORDS // 10)}) for i in range(samples)]
    data.write_text("\n".join(lines) + "\n")
    here = [sys.executable, __file__, str(folder), str(data)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(here, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def in_process(folder: Path, data: Path) -> None:
    torch.set_num_threads(1)
    arch, examples = encode(folder / "0", data)
    reference = save_reference(load_model(folder / "1"), arch, examples, folder / f"reference-{data.stem}")
    model = load_model(folder / "0")
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    summary = evaluate(model, arch, examples, reference).summary()
    added = status("VmHWM") - before
    tokens = summary["tokens"]
    whole = 4 * VOCABULARY * tokens / MIB
    row = {"samples": len(examples), "tokens": tokens, "model_mib": before, "added_mib": added, "kl": summary["kl"]}
    print(json.dumps(row | {"one_matrix_of_log_probabilities_mib": whole}))


def status(name: str) -> float:
    """MiB of this process."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


if __name__ == "__main__":
    if len(sys.argv) == 3:
        in_process(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
