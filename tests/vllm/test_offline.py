"""Checkpoints of ours in real vLLM on the CPU: the answers of transformers, with one rank and with two.

`make test-vllm` runs this in an environment of its own. Token ids come from vLLM; transformers reads the same ones, and
must have wanted each token that vLLM gave.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.methods.recipes import load_recipe
from qe_dist.serve.loading import load_model
from tests.vllm.questions import DATA, MODEL, QUESTIONS, RECIPES, ROOT, STORIES, Question, prompts

pytestmark = pytest.mark.vllm

EQUAL = 0.98
"""Share of the answers to questions that must be those of transformers, token by token."""
MEAN_LOGPROB = {1: 0.001, 2: 0.02}
"""By ranks: how far the log-probability of a token may be off on average. Two ranks have two activation grids, so that
stories, which are free to go on in many ways, part ways somewhere."""


def serve(checkpoint: Path, ranks: int, asked: list[Question], folder: Path) -> subprocess.CompletedProcess[str]:
    """vLLM in a process of its own; its answers are in ANSWERS of the folder."""
    rows = [{"prompt": q.prompt} | ({"image": q.image} if q.image else {}) for q in asked]
    (folder / "prompts").write_text("\n".join(map(json.dumps, rows)))
    words = ["-m", "tests.vllm.generate", checkpoint, ranks, folder / "prompts", folder / "answers"]
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=600)


def answers(checkpoint: Path, ranks: int, asked: list[Question], folder: Path) -> list[dict[str, Any]]:
    done = serve(checkpoint, ranks, asked, folder)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line]
    assert done.returncode == 0, said
    return json.loads((folder / "answers").read_text())


def in_transformers(
    checkpoint: Path, asked: list[Question], given: list[dict[str, Any]]
) -> Iterator[tuple[bool, Tensor]]:
    """Of each answer: whether transformers would have given it, and how far the log-probabilities are apart."""
    from PIL import Image
    from transformers import AutoImageProcessor

    model, processor = load_model(checkpoint), AutoImageProcessor.from_pretrained(checkpoint)
    for question, answer in zip(asked, given, strict=True):
        ids = torch.tensor([answer["prompt"] + answer["tokens"]])
        vision = {}
        if question.image:
            seen = processor([Image.open(question.image).convert("RGB")], return_tensors="pt")
            vision = {name: seen[name] for name in ("pixel_values", "image_grid_thw")}
        types = (ids == model.config.image_token_id).int()
        with torch.no_grad():
            logits = model(input_ids=ids, mm_token_type_ids=types, **vision).logits[0]
        told = torch.log_softmax(logits.float(), dim=-1)[len(answer["prompt"]) - 1 : -1]
        tokens = torch.tensor(answer["tokens"])
        off = told.gather(1, tokens[:, None])[:, 0] - torch.tensor(answer["logprobs"])
        yield bool((told.argmax(dim=-1) == tokens).all()), off.abs()


def accuracy(asked: list[Question], given: list[dict[str, Any]]) -> float:
    pairs = [(q.answer, a["text"].strip()) for q, a in zip(asked, given, strict=True) if q.answer]
    return sum(wanted == got for wanted, got in pairs) / len(pairs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_vllm_answers_as_transformers_does(recipe: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    asked = prompts()
    assert len(asked) == QUESTIONS + STORIES
    one = answers(checkpoints[recipe], 1, asked, tmp_path)
    two = answers(checkpoints[recipe], 2, asked, tmp_path)
    for ranks, given in ((1, one), (2, two)):
        same, off = zip(*in_transformers(checkpoints[recipe], asked, given), strict=True)
        assert sum(same[:QUESTIONS]) >= EQUAL * QUESTIONS, f"{ranks} ranks: {sum(same[:QUESTIONS])} answers equal"
        assert torch.cat(off).mean() <= MEAN_LOGPROB[ranks], f"{ranks} ranks"
    assert sum(a["tokens"] == b["tokens"] for a, b in zip(one[:QUESTIONS], two, strict=False)) >= EQUAL * QUESTIONS
    assert abs(accuracy(asked, one) - accuracy(asked, two)) <= 0.0051  # half a point: one question


def test_without_its_experts_a_checkpoint_answers_otherwise(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """That is what the test above would see if vLLM left them out."""
    asked, bare = prompts(), tmp_path / "bare"
    shutil.copytree(checkpoints["qe-extract-w4a6"], bare)
    for path in bare.glob("block-*.safetensors"):
        tensors = load_file(path)
        repairs = [n for n, t in tensors.items() if n.rpartition(".")[2] in ("lr_expert_columns", "lr_shared_columns")]
        assert repairs
        save_file(tensors | {n: torch.zeros_like(tensors[n]) for n in repairs}, path)
    given = answers(bare, 1, asked, tmp_path)
    same = [equal for equal, _ in in_transformers(checkpoints["qe-extract-w4a6"], asked, given)]
    assert sum(same[:QUESTIONS]) < EQUAL * QUESTIONS


def test_what_cannot_be_cut_is_named(folder: Path, tmp_path: Path) -> None:
    run = RunConfig(MODEL, load_recipe("rtn-w4a16g128"), DATA / "calibration.jsonl", folder / "wide")
    local.quantize(run)
    done = serve(run.output, 2, prompts()[:1], tmp_path)
    assert done.returncode != 0
    assert "mlp.down: the 320 inputs of a rank do not divide into groups of 128" in done.stdout + done.stderr


def test_a_missing_tensor_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["rtn-w4a8"], broken)
    path = sorted(broken.glob("block-*.safetensors"))[-1]
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("down_proj.weight_scale"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path)
    done = serve(broken, 1, prompts()[:1], tmp_path)
    assert done.returncode != 0
    assert "mlp.down: the checkpoint lacks weight_scale" in done.stdout + done.stderr


def test_a_tensor_of_another_shape_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["rtn-w4a8"], broken)
    path = sorted(broken.glob("block-*.safetensors"))[0]
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("o_proj.weight_packed"))
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, path)
    done = serve(broken, 1, prompts()[:1], tmp_path)
    assert done.returncode != 0
    assert "self_attn.o: weight_packed of shape" in done.stdout + done.stderr
