"""A checkpoint that was padded for two ranks, on two ranks of real vLLM: without padding it could not be cut."""

from pathlib import Path

import pytest

from qe_dist.checkpoint.serving import serving_problems
from qe_dist.checkpoint.verify import Checkpoint
from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.methods.recipes import load_recipe
from tests.vllm.generate import Job, generate
from tests.vllm.questions import DATA, EQUAL, MODEL, prompts
from tests.vllm.twin import Twin

pytestmark = pytest.mark.vllm

ASKED = 60


def test_a_padded_checkpoint_answers_on_two_ranks_as_in_transformers(tmp_path: Path) -> None:
    run = RunConfig(
        MODEL, load_recipe("qe-w4a16"), DATA / "calibration.jsonl", tmp_path / "out", tensor_parallel_size=2
    )
    local.quantize(run)
    checkpoint = Checkpoint.open(run.output)
    assert checkpoint.manifest.padding == [640, 768]
    assert serving_problems(checkpoint.config, 2) == ()
    asked = prompts()[:ASKED]
    given = generate([Job("padded", str(run.output))], asked, 2, tmp_path)["padded"]
    same, _ = Twin(run.output).compare(asked, given)
    assert sum(same) >= EQUAL * ASKED
