"""Checkpoints of ours in real vLLM on the CPU: the answers of transformers, with one rank and with two.

`make test-vllm` runs this in an environment of its own. Token ids come from vLLM; transformers reads the same ones, and
must have wanted each token that vLLM gave.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qe_dist.io.checkpoint import MANIFEST
from tests.vllm.generate import Answers, Job, generate
from tests.vllm.questions import EQUAL, MODEL, ONE_RANK, QUESTIONS, RECIPES, STORIES, WIDE, prompts
from tests.vllm.twin import Twin, accuracy

pytestmark = [pytest.mark.vllm, pytest.mark.nightly]

MEAN_LOGPROB = {1: 0.001, 2: 0.02}
"""By ranks: how far the log-probability of a token may be off on average. Two ranks have two activation grids, so that
stories, which are free to go on in many ways, part ways somewhere."""
SOME = 60
"""Questions are enough where nearly all answers are equal, or many are not."""
CACHED, ADAPTED = "qe-w4a8", "qe-w4a16g64"
ROUTED = "qe-extract-w4a8"
ONE_GRAPH = {"mode": 2, "backend": "eager"}
"""torch.compile traces the whole model, as it does on GPUs, and its graph runs as it is: compiling takes a minute."""
RANK, STRENGTH = 8, 0.02
"""Of the LoRA adapter: rank, and size of its up matrices."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_vllm_answers_as_transformers_does(
    recipe: str, checkpoints: dict[str, Path], offline: Callable[[int], Answers]
) -> None:
    asked, twin = prompts(), Twin(checkpoints[recipe])
    found = {ranks: offline(ranks)[recipe] for ranks in ((1,) if recipe == ONE_RANK else (1, 2))}
    for ranks, given in found.items():
        assert len(asked) == len(given) == QUESTIONS + STORIES
        same, off = twin.compare(asked, given)
        assert sum(same[:QUESTIONS]) >= EQUAL * QUESTIONS, f"{ranks} ranks: {sum(same[:QUESTIONS])} answers equal"
        assert off.mean() <= MEAN_LOGPROB[ranks], f"{ranks} ranks"
    one, two = found[1], found[max(found)]
    assert sum(a["tokens"] == b["tokens"] for a, b in zip(one[:QUESTIONS], two, strict=False)) >= EQUAL * QUESTIONS
    assert abs(accuracy(asked, one) - accuracy(asked, two)) <= 0.0051  # half a point: one question


def test_what_cannot_be_cut_is_named(offline: Callable[[int], Answers]) -> None:
    assert "mlp.down: the 320 inputs of a rank do not divide into groups of 128" in offline(2)[WIDE]["error"]
    said = "self_attn.o: w4a6k64 has dynamic outlier channels, and each of 2 ranks would choose them in its own slice"
    assert said in offline(2)[ONE_RANK]["error"]


@pytest.fixture(scope="module")
def others(checkpoints: dict[str, Path], folder: Path) -> Answers:
    """Engines of checkpoints and with options of which the tests below say what they are; all on one rank."""

    def damaged(name: str, source: str, edit: Callable[[dict[str, Tensor]], None], keep: bool = False) -> Job:
        """keep: the manifest, which tells at once what is damaged."""
        broken = folder / name
        shutil.copytree(checkpoints[source], broken)
        for path in sorted(broken.glob("block-*.safetensors")):
            tensors = load_file(path)
            edit(tensors)
            save_file(tensors, path)
        if not keep:
            (broken / MANIFEST).unlink()
        return Job(name, str(broken))

    jobs = [
        damaged("bare", "qe-extract-w4a8", zero_the_experts),
        damaged("lost", "rtn-w4a8", lambda tensors: tensors.pop(one_of(tensors, "down_proj.weight_scale"))),
        damaged("misshaped", "rtn-w4a8", cut_a_row),
        damaged("flipped", "rtn-w4a8", flip_a_bit, keep=True),
        damaged("extra", "rtn-w4a8", lambda tensors: tensors.update(extra=torch.ones(1)), keep=True),
        Job("uncached", str(checkpoints[CACHED]), {"enable_prefix_caching": False}),
        Job("cached", str(checkpoints[CACHED]), {"enable_prefix_caching": True, "block_size": 32}, times=2),
        Job("compiled", str(checkpoints[ROUTED]), {"enforce_eager": False, "compilation_config": ONE_GRAPH}),
    ]
    return generate(jobs, prompts(), 1, folder)


def one_of(tensors: dict[str, Tensor], ending: str) -> str:
    return next(name for name in tensors if name.endswith(ending))


def zero_the_experts(tensors: dict[str, Tensor]) -> None:
    repairs = [n for n in tensors if n.rpartition(".")[2] in ("lr_expert_columns", "lr_shared_columns")]
    assert repairs
    tensors |= {name: torch.zeros_like(tensors[name]) for name in repairs}


def cut_a_row(tensors: dict[str, Tensor]) -> None:
    name = one_of(tensors, "o_proj.weight_packed")
    tensors[name] = tensors[name][:-1].contiguous()


def flip_a_bit(tensors: dict[str, Tensor]) -> None:
    tensors[one_of(tensors, "q_proj.weight_packed")].view(-1)[77:78].bitwise_xor_(1 << 30)


def test_without_its_experts_a_checkpoint_answers_otherwise(checkpoints: dict[str, Path], others: Answers) -> None:
    """That is what the first test would see if vLLM left them out."""
    same, _ = Twin(checkpoints["qe-extract-w4a8"]).compare(prompts()[:SOME], others["bare"][:SOME])
    assert sum(same) < EQUAL * SOME


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ("lost", "mlp.down: the checkpoint lacks weight_scale"),
        ("misshaped", "self_attn.o: weight_packed of shape"),
        ("flipped", "self_attn.q_proj.weight_packed is not as written"),
        ("extra", "extra is not of this checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_name_of_the_tensor(job: str, said: str, others: Answers) -> None:
    assert "error" in others[job], "it was loaded"
    assert said in others[job]["error"]


def test_prefix_caching_changes_no_answer(others: Answers) -> None:
    """Everything was asked twice; the second time the beginnings of the prompts were in the cache."""
    cached, uncached = others["cached"], others["uncached"]
    assert not any(answer["cached"] for answer in uncached)
    found = [i for i, answer in enumerate(cached[:QUESTIONS]) if answer["cached"]]
    assert len(found) > QUESTIONS / 3  # the others are shorter than a block
    assert sum(cached[i]["tokens"] == uncached[i]["tokens"] for i in found) >= EQUAL * len(found)


def test_compiled_to_one_graph_it_answers_the_same(offline: Callable[[int], Answers], others: Answers) -> None:
    """With groups that choose the experts of others, which is a side effect of the code that is traced."""
    eager, compiled = offline(1)[ROUTED], others["compiled"]
    assert "error" not in compiled, compiled
    same = [a["tokens"] == b["tokens"] for a, b in zip(eager[:QUESTIONS], compiled, strict=False)]
    assert sum(same) >= EQUAL * QUESTIONS


def put_adapter(folder: Path) -> None:
    """A LoRA adapter of random numbers, as PEFT stores it."""
    folder.mkdir()
    named = {f"base_model.model.{name}.weight": tensor for name, tensor in adapter().items()}
    targets = sorted({name.split(".")[-3] for name in named})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(named, folder / "adapter_model.safetensors")


def adapter() -> dict[str, Tensor]:
    """By the name of the module in the model, down (lora_A) and up (lora_B) matrices of every target."""
    config = json.loads((MODEL / "config.json").read_text())["text_config"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    random, found = torch.Generator().manual_seed(0), {}
    for layer in range(config["num_hidden_layers"]):
        for module, (outputs, inputs) in shapes.items():
            name = f"model.language_model.layers.{layer}.{module}"
            found[f"{name}.lora_A"] = torch.randn(RANK, inputs, generator=random) / inputs**0.5
            found[f"{name}.lora_B"] = torch.randn(outputs, RANK, generator=random) * STRENGTH
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_lora_adapter_does_what_it_does_in_floating_point(
    ranks: int, checkpoints: dict[str, Path], folder: Path
) -> None:
    """It reads the input of the layer and adds to its output: y + 2 B A x."""
    plain, twin = Twin(checkpoints[ADAPTED]), Twin(checkpoints[ADAPTED])
    matrices = adapter()
    for name in {name.rpartition(".")[0] for name in matrices}:
        down, up = matrices[f"{name}.lora_A"], matrices[f"{name}.lora_B"]

        def add(_: Any, inputs: tuple[Tensor], output: Tensor, down: Tensor = down, up: Tensor = up) -> Tensor:
            return output + 2 * (inputs[0] @ down.T) @ up.T

        twin.model.get_submodule(name).register_forward_hook(add)
    put_adapter(folder / f"adapter-{ranks}")
    lora = {"enable_lora": True, "max_lora_rank": RANK}
    job, asked = Job("adapted", str(checkpoints[ADAPTED]), lora, str(folder / f"adapter-{ranks}")), prompts()[:SOME]
    given = generate([job], asked, ranks, folder)["adapted"]
    assert "error" not in given, given
    same, off = twin.compare(asked, given)
    assert sum(same) >= EQUAL * SOME
    assert off.mean() <= MEAN_LOGPROB[ranks]
    assert sum(plain.compare(asked, given)[0]) < EQUAL * SOME  # it does something
