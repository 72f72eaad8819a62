"""What --help says beside docstrings: each command in a few words, and two examples of it."""

from typing import Any

SHORT = {
    "quantize": "make a low-bit checkpoint of a model; continues a run",
    "eval": "measure a model or checkpoint on samples",
    "compare": "fit several recipes and show which one is best",
    "data": "show what samples a source has, and every fault",
    "demo": "quantize the bundled models and compare methods",
    "submit": "run a command as a job of a Ray cluster",
    "verify": "check every file and number of a checkpoint",
    "serve": "serve a checkpoint over HTTP",
    "status": "show how a run is doing",
    "export": "write a checkpoint for engines without qe-dist",
    "sensitivity": "measure how much image tokens count, for mbq",
}
EXAMPLES = {
    "quantize": (
        "qe-dist quantize MODEL --recipe qe-w4a8 --calibration samples.jsonl \\\n    --output DIR",
        "qe-dist quantize ORG/NAME --revision main \\\n"
        "    --recipe qe-w4a16g64 --calibration samples.jsonl --output DIR",
    ),
    "eval": (
        "qe-dist eval DIR --data questions.jsonl --reference MODEL",
        "qe-dist eval DIR --data questions.jsonl --stream --json",
    ),
    "compare": (
        "qe-dist compare --list",
        "qe-dist compare MODEL --recipes rtn-w4a8,gptq-w4a8,qe-w4a8 \\\n"
        "    --calibration calibration.jsonl --data development.jsonl --output DIR",
    ),
    "data": (
        "qe-dist data samples.jsonl --model MODEL",
        "qe-dist data hf:org/name#train --samples 128 \\\n    --columns question=query,answer=reply",
    ),
    "demo": ("qe-dist demo", "qe-dist demo --workers 4 --output DIR"),
    "submit": (
        "qe-dist submit --address http://HOST:8265 quantize /shared/model \\\n"
        "    --recipe qe-w4a8 --calibration /shared/data.jsonl --output /shared/out",
        "qe-dist submit --attach JOB",
    ),
    "verify": ("qe-dist verify DIR --source MODEL", "qe-dist verify DIR --tensor-parallel-size 1,2,4"),
    "serve": (
        "qe-dist serve DIR --local",
        "qe-dist serve DIR --tensor-parallel-size 2 --replicas 2 \\\n    -- --max-model-len 8192",
    ),
    "status": ("qe-dist status DIR", "qe-dist status DIR --once"),
    "export": ("qe-dist export DIR --output OUT --base-only", "qe-dist export DIR --output OUT --peft"),
    "sensitivity": (
        "qe-dist sensitivity MODEL --data samples.jsonl",
        "qe-dist sensitivity ORG/NAME --data samples.jsonl",
    ),
}


def told(command: str) -> dict[str, Any]:
    """What typer is given for a command. \\b keeps lines as they are."""
    lines = "\n".join(f"  {line}" for example in EXAMPLES[command] for line in example.splitlines())
    return {"short_help": SHORT[command], "epilog": f"\b\nExamples:\n{lines}"}
