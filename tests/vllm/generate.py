"""python -m tests.vllm.generate CHECKPOINT RANKS PROMPTS ANSWERS: greedy answers of real vLLM, offline, as JSON.

A process of its own for each engine, as vLLM itself has it. PROMPTS: JSON lines of `prompt` and maybe `image`, a path.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

MAX_TOKENS = 48


def main(checkpoint: str, ranks: str, prompts: str, answers: str) -> None:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    if int(ranks) > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(int(ranks))))
    from vllm import LLM, SamplingParams

    engine = LLM(
        checkpoint,
        tensor_parallel_size=int(ranks),
        dtype="float32",  # so that only our layers may differ from transformers'
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=32,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    asked = [_prompt(json.loads(line)) for line in Path(prompts).read_text().splitlines()]
    outputs = engine.generate(asked, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, logprobs=0))
    Path(answers).write_text(json.dumps([_answer(output) for output in outputs]))


def _prompt(row: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    image = {"multi_modal_data": {"image": Image.open(row["image"]).convert("RGB")}} if "image" in row else {}
    return {"prompt": row["prompt"]} | image


def _answer(output: Any) -> dict[str, Any]:
    """prompt: ids as the model read them, image placeholders expanded. logprobs: of the tokens of the answer."""
    best = output.outputs[0]
    told = [step[token].logprob for step, token in zip(best.logprobs, best.token_ids, strict=True)]
    return {
        "text": best.text,
        "prompt": list(output.prompt_token_ids),
        "tokens": list(best.token_ids),
        "logprobs": told,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
