"""A tiny checkpoint of every family in real vLLM on the CPU, with one rank and with two, beside transformers.

Weights are random, so that no answer is likely: what is compared is the probability of each token of an answer.
"""

import copy
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qe_dist import archs
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.io.checkpoint import read_manifest
from qe_dist.methods.recipes import load_recipe
from tests.tiny import calibration, stir, stories, tiny_model
from tests.vllm.generate import Answers, Job, generate
from tests.vllm.questions import Question, prompts
from tests.vllm.twin import Twin

pytestmark = [pytest.mark.vllm, pytest.mark.nightly]

NAMES = archs.names()
SEVERAL_LAYOUTS = ("qwen2_vl", "qwen2_5_vl")
"""Families that transformers saves again under other names than the published ones."""
RECIPE = "qe-extract-w4a16g32"
WIDER = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}  # fmt: skip
SECTIONS = {32: [4, 6, 6], 64: [12, 10, 10]}
"""M-RoPE by the channels of a head that are rotated."""
SERVED = [name for name in NAMES if not name.startswith("qwen3_5")]
"""vLLM's gated delta net on a CPU takes bf16 alone, and these tests compare in float32."""
FEW, MEAN_LOGPROB = 4, 0.001


def seen(name: str) -> bool:
    return archs.get(name).has_vision(archs.get(name).tiny)


def config(name: str) -> dict[str, Any]:
    """The tiny configuration, but with heads and towers wide enough for vLLM's attention on a CPU."""
    found = copy.deepcopy(dict(archs.get(name).tiny))
    text = found.get("text_config", found)
    heads = 64 if "head_dim" in text else 32
    text |= WIDER | ({"head_dim": heads} if heads == 64 else {})
    if "text_config" in found:
        rotated = int(heads * text["rope_parameters"].get("partial_rotary_factor", 1.0))
        text["rope_parameters"]["mrope_section"] = SECTIONS[rotated]
        tower = found["vision_config"]
        tower |= {"embed_dim": 64, "hidden_size": 128} if "embed_dim" in tower else {"hidden_size": 64}
        tower |= {"out_hidden_size": 128} if "out_hidden_size" in tower else {}
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every family."""
    root = tmp_path_factory.mktemp("families")
    for name in NAMES:
        model = stir(tiny_model(root / f"{name}-model", name, config=config(name)))
        data = (calibration if seen(name) else stories)(root / "data")
        quantize(RunConfig(model, load_recipe(RECIPE), data, root / name, sample_tokens=256))
    return {name: root / name for name in NAMES}


def asked(vision: bool) -> list[Question]:
    """Questions about images, and beginnings of stories."""
    questions = prompts()
    return questions[:FEW] * vision + questions[-FEW:]


@pytest.fixture(scope="module")
def answers(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Answers]:
    """For a number of ranks, what every family answers."""

    def answer(ranks: int) -> Answers:
        given: Answers = {}
        for vision in (False, True):
            jobs = [Job(name, str(made[name])) for name in SERVED if seen(name) is vision]
            given |= generate(jobs, asked(vision), ranks, tmp_path_factory.mktemp(f"{vision}-{ranks}"))
        return given

    return cache(answer)


def name_faults(folder: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vLLM itself, while it is imported
        from qe_dist.serve import vllm_names

        return vllm_names.name_faults(folder)


@pytest.mark.parametrize("name", NAMES)
def test_vllm_maps_every_name_to_where_the_plug_in_has_it(name: str, made: dict[str, Path]) -> None:
    assert name_faults(made[name]) == []


@pytest.mark.parametrize("name", SEVERAL_LAYOUTS)
def test_vllm_maps_every_name_of_a_model_that_was_saved_again(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    """Under the names that transformers has in memory."""
    arch, source = archs.get(name), made[name].with_name(f"{name}-model")
    again = shutil.copytree(source, tmp_path / "again")
    arch.auto_class().from_pretrained(source).save_pretrained(again, save_original_format=False)
    quantize(RunConfig(again, load_recipe(RECIPE), calibration(tmp_path / "data"), tmp_path / "out", sample_tokens=256))
    assert any(block.prefix.startswith("model.language_model.") for block in read_manifest(tmp_path / "out").blocks)
    assert name_faults(tmp_path / "out") == []


def test_a_name_that_vllm_would_not_find_is_told(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    names = archs.get("llama").in_vllm
    swapped = {"self_attn.qkv": "self_attn.o_proj", "self_attn.o": "self_attn.qkv_proj"}
    wrong = replace(archs.get("llama"), in_vllm=replace(names, modules={**names.modules, **swapped}))
    monkeypatch.setattr(archs.llama, "FAMILY", wrong)
    faults = name_faults(made["llama"])
    assert any("layers.0.self_attn.q_proj.weight_packed: vLLM takes it for a tensor of model." in f for f in faults)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", SERVED)
def test_vllm_computes_what_transformers_does(
    name: str, ranks: int, made: dict[str, Path], answers: Callable[[int], Answers]
) -> None:
    given = answers(ranks)[name]
    assert "error" not in given, given
    _, off = Twin(made[name]).compare(asked(seen(name)), given)
    assert off.mean() < MEAN_LOGPROB
