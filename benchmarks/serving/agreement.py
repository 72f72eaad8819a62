"""vLLM beside transformers on the bundled outlier model: answers and log-probabilities, on one rank and on two.

    .venv-vllm/bin/python benchmarks/serving/agreement.py

writes benchmarks/results/agreement.json. It asks what `make test-vllm` asks: 200 questions about images, and 20
beginnings of stories that are continued by 48 tokens, greedily. An answer is equal if transformers would have chosen
each of its tokens.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from qe_pipelines.results import write_result  # noqa: E402

from qe_dist.flow import local  # noqa: E402
from qe_dist.flow.config import RunConfig, by_rotation  # noqa: E402
from qe_dist.methods.recipes import load_recipe  # noqa: E402
from tests.vllm.generate import Answers, Job, generate  # noqa: E402
from tests.vllm.questions import CUT, DATA, MODEL, ONE_RANK, QUESTIONS, RECIPES, STORIES, prompts  # noqa: E402
from tests.vllm.twin import Twin, accuracy  # noqa: E402


def row(checkpoint: Path, given: dict[int, Answers]) -> dict[str, Any]:
    """By ranks: equal answers, the mean and the largest difference of a token's log-probability, and accuracy."""
    asked, twin, found = prompts(), Twin(checkpoint), {}
    for ranks, answers in given.items():
        if ranks > 1 and checkpoint.name == ONE_RANK:
            continue
        mine = answers[checkpoint.name]
        same, off = twin.compare(asked, mine)
        found[str(ranks)] = {
            "questions": sum(same[:QUESTIONS]),
            "stories": sum(same[QUESTIONS:]),
            "mean_logprob": off.mean().item(),
            "largest_logprob": off.max().item(),
            "accuracy": accuracy(asked, mine),
        }
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = DATA / "calibration.jsonl"
        runs = [RunConfig(MODEL, load_recipe(n), data, folder / n, tensor_parallel_size=CUT.get(n, 1)) for n in RECIPES]
        for together in by_rotation(runs):
            local.quantize(*together)
        jobs = [Job(run.output.name, str(run.output)) for run in runs]
        given = {ranks: generate(jobs, prompts(), ranks, folder) for ranks in (1, 2)}
        rows = {run.output.name: row(run.output, given) for run in runs}
    result = {"questions": QUESTIONS, "stories": STORIES, "rows": rows}
    write_result(ROOT / "benchmarks" / "results" / "agreement.json", result)


if __name__ == "__main__":
    main()
