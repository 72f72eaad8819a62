"""Exports in vLLM as anyone has it: our plug-in is not even registered (VLLM_PLUGINS is empty).

vLLM's kernel for 4 bits on the CPU computes in float16 or bf16, so these bounds are wider than those of our own layers.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qe_dist.core.scheme import Scheme
from qe_dist.flow import local
from qe_dist.flow.config import RunConfig
from qe_dist.flow.export import ADAPTER, export
from qe_dist.methods.recipes import load_recipe
from tests.vllm.questions import DATA, MODEL, QUESTIONS, prompts
from tests.vllm.test_offline import EQUAL, answers, in_transformers

pytestmark = pytest.mark.vllm

MEAN_LOGPROB = 0.005
"""How far the log-probability of a token may be off on average, stories included; float16 was seen to need 0.0008."""
ADAPTED = "aser-w4a16g64"
"""Its LoRA holds the most important channels alone, so that nothing goes without it."""


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert os.environ["VLLM_PLUGINS"] == ""


def stripped(checkpoint: Path, folder: Path) -> Path:
    """Our checkpoint without repairs, its activations in 16 bits: what a base-only export should be."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(".run"))
    config = json.loads((folder / "config.json").read_text())
    for layout in config["quantization_config"]["layouts"]:
        for group in layout.values():
            scheme = Scheme.parse(group["scheme"])
            group["scheme"] = str(Scheme(scheme.weight_bits, group_size=scheme.group_size))
            for shapes in (group["input"], *group["linears"].values()):
                for name in [name for name in shapes if name.startswith("lr_")]:
                    del shapes[name]
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("block-*.safetensors"):
        save_file({n: t for n, t in load_file(path).items() if ".lr_" not in n}, path)
    return folder


@pytest.mark.parametrize("recipe", ["rtn-w4a8", "qe-w4a6"])
def test_vllm_answers_from_the_base_alone(recipe: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    asked = prompts()
    export(checkpoints[recipe], tmp_path / "stock", peft=False)
    given = answers(tmp_path / "stock", 1, asked, tmp_path, "float16")
    same, off = zip(*in_transformers(stripped(checkpoints[recipe], tmp_path / "bare"), asked, given), strict=True)
    assert sum(same[:QUESTIONS]) >= EQUAL * QUESTIONS
    assert torch.cat(off).mean() <= MEAN_LOGPROB


def test_vllm_repairs_the_base_by_the_lora(folder: Path, tmp_path: Path) -> None:
    """As our whole checkpoint in transformers; without the LoRA it would not be."""
    asked, run = prompts(), RunConfig(MODEL, load_recipe(ADAPTED), DATA / "calibration.jsonl", folder / ADAPTED)
    local.quantize(run)
    export(run.output, tmp_path / "stock", peft=True)
    given = answers(tmp_path / "stock", 1, asked, tmp_path, "float16", tmp_path / "stock" / ADAPTER)
    same, off = zip(*in_transformers(run.output, asked, given), strict=True)
    assert sum(same[:QUESTIONS]) >= EQUAL * QUESTIONS
    assert torch.cat(off).mean() <= MEAN_LOGPROB
    alone, off = zip(*in_transformers(stripped(run.output, tmp_path / "bare"), asked, given), strict=True)
    assert sum(alone[:QUESTIONS]) < 0.2 * QUESTIONS
    assert torch.cat(off).mean() > 100 * MEAN_LOGPROB
