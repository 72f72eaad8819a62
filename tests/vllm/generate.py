"""Greedy answers of real vLLM, offline, as JSON: one process for each rank, one engine after the other.

Importing vLLM takes 10 s and starting its processes 20 s more; an engine of these small models that lives in the
process of its caller is ready after 3 s. vLLM itself offers that (`external_launcher`, as under torchrun). Engines with
processes of their own, as `vllm serve` has them, are what test_http.py asks.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.vllm.questions import ROOT, Question

MAX_TOKENS = 48
Answers = dict[str, Any]
"""By the name of the job: its answers, or a table with its `error`."""


@dataclass(frozen=True)
class Job:
    """An engine, and what is kept of it: NAME.json has its answers, or the error that it ended with."""

    name: str
    checkpoint: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of the engine, beside those of all."""
    adapter: str | None = None
    """A LoRA adapter for all requests."""
    times: int = 1
    """How often everything is asked; the last answers are kept."""
    meeting: str = ""
    """The file that its ranks meet by."""


def generate(jobs: Sequence[Job], asked: Sequence[Question], ranks: int, folder: Path) -> Answers:
    """Runs all jobs in `ranks` processes."""
    jobs = [replace(job, meeting=str(folder / uuid4().hex)) for job in jobs]
    rows = [{"prompt": q.prompt} | ({"image": q.image} if q.image else {}) for q in asked]
    (folder / "jobs").write_text(json.dumps([asdict(job) for job in jobs]))
    (folder / "prompts").write_text("\n".join(map(json.dumps, rows)))
    words = [sys.executable, "-m", "tests.vllm.generate", *(str(folder / n) for n in ("jobs", "prompts", "."))]
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        with log.open("w") as file:
            processes.append(subprocess.Popen(words, cwd=ROOT, env=os.environ | place, stdout=file, stderr=file))
    try:
        ended = [process.wait(600) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for job in jobs:
            for left in Path("/dev/shm").glob(f"{Path(job.meeting).name}*"):
                left.unlink()
    assert not any(ended), "\n".join(log.read_text()[-3000:] for log in logs)
    return {job.name: json.loads((folder / f"{job.name}.json").read_text()) for job in jobs}


def main(jobs: str, prompts: str, answers: str) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(int(os.environ["WORLD_SIZE"]))))
    asked = [_prompt(json.loads(line)) for line in Path(prompts).read_text().splitlines()]
    for job in (Job(**one) for one in json.loads(Path(jobs).read_text())):
        try:
            told: Any = _run(job, asked)
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        _forget()
        if os.environ["RANK"] == "0":
            Path(answers, f"{job.name}.json").write_text(json.dumps(told))


def _run(job: Job, asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    _meet(job.meeting)
    # In float32 only our layers may differ from transformers'.
    options = {"dtype": "float32", "enforce_eager": True} | job.options
    engine = LLM(
        job.checkpoint,
        tensor_parallel_size=int(os.environ["WORLD_SIZE"]),
        distributed_executor_backend="external_launcher",
        max_model_len=1024,
        max_num_seqs=32,
        limit_mm_per_prompt={"image": 1, "video": 0},
        **options,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, logprobs=0)
    adapter = LoRARequest("adapter", 1, job.adapter) if job.adapter else None
    for _ in range(job.times):
        outputs = engine.generate(asked, greedy, use_tqdm=False, lora_request=adapter)
    return [_answer(output) for output in outputs]


def _meet(file: str) -> None:
    """vLLM would have the ranks meet by MASTER_PORT and then, on CPUs, name the memory that they share the same for
    every engine of the machine, so that one that was killed is in the way of all that follow."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    place = (f"file://{file}", int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]))
    ExecutorWithExternalLauncher._distributed_args = lambda _: place


def _forget() -> None:
    """What the engine of this process leaves behind for the next one."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def _prompt(row: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    image = {"multi_modal_data": {"image": Image.open(row["image"]).convert("RGB")}} if "image" in row else {}
    return {"prompt": row["prompt"]} | image


def _answer(output: Any) -> dict[str, Any]:
    """prompt: ids as the model read them, image placeholders expanded. logprobs: of the tokens of the answer.
    cached: so many tokens of the prompt were not computed again."""
    best = output.outputs[0]
    told = [step[token].logprob for step, token in zip(best.logprobs, best.token_ids, strict=True)]
    return {
        "text": best.text,
        "prompt": list(output.prompt_token_ids),
        "tokens": list(best.token_ids),
        "logprobs": told,
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
