"""A checkpoint that transformers cuts over two processes gives what it gives in one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qe_dist import archs
from qe_dist.core.errors import ConfigError
from qe_dist.core.layout import BlockLayout, Layout, TensorSpec
from qe_dist.data.samples import load_images, read_samples
from qe_dist.serve import transformers_tp
from qe_dist.serve.loading import load_model
from tests.gate import in_gate
from tests.serve.conftest import ADAPTED, OUTLIERS, ROTATED
from tests.serve.python import python
from tests.serve.ranks import Answers, ask
from tests.tiny import DATA, MODELS

ROOT = Path(__file__).parents[2]
ARCH = archs.get("qwen2_vl")
QUESTIONS, STORIES = 8, 2
FLOAT = {"rtn-w4a16g64": 1e-5, ROTATED: 1e-4}
"""Of the largest logit: the same sums of float32, taken in another order. A rotation of the whole stream smears the
channels of the largest norm gains over all others, and with them the error of the sums: in one process, the halves of
each product summed apart move the logits of a prompt by 5e-7, and those of the rotated model by 7e-6."""
LOGPROB = 0.05
"""How far log-probabilities may be apart on average where activations are rounded: in o and down every rank rounds its
part of a token to a grid of its own. Where two tokens were about equally likely, answers part ways; stories do."""


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Tensor]]:
    """About images, then beginnings of stories."""
    encoder, samples = ARCH.encoder(MODELS / "outlier"), read_samples(DATA / "evaluation.jsonl")
    asked = [encoder.prompt(sample, load_images(sample)) for sample in samples[:QUESTIONS]]
    begun = [encoder(sample, []) for sample in samples[-STORIES:]]
    return [ARCH.model_inputs([example], pad=0) for example in (*asked, *begun)]


@pytest.fixture(scope="module")
def cut(
    checkpoints: dict[str, Path], questions: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Answers | str]:
    """What two ranks say of every checkpoint, or why they do not."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(questions, folder / "questions")
    words = [folder / "questions", folder / "answers", *checkpoints.values()]
    python("-m", "tests.serve.ranks", *words, ranks=2, cwd=ROOT)
    found = {name: torch.load(folder / "answers")[str(path)] for name, path in checkpoints.items()}
    return {name: said if isinstance(said, str) else Answers(**said) for name, said in found.items()}


CUT = ("rtn-w4a16g64", ADAPTED, "qe-extract-w4a6", "lists+gptq+qera-w4a6@0.5", "smoothquant+cross_modal-w4a6", ROTATED)


@pytest.mark.parametrize("recipe", in_gate(["qe-extract-w4a6", ROTATED], CUT))
def test_two_ranks_answer_as_one(recipe: str, checkpoints: dict[str, Path], questions: list[Any], cut: Any) -> None:
    one, two = ask(load_model(checkpoints[recipe]), questions), cut[recipe]
    assert two.weights == [one.weights[0] // 2] * 2
    if recipe in FLOAT:
        assert one.tokens == two.tokens
        assert all(
            (a - b).abs().max() < FLOAT[recipe] * a.abs().max() for a, b in zip(one.logits, two.logits, strict=True)
        )
        return
    equal = [a == b for a, b in zip(one.tokens, two.tokens, strict=True)]
    assert sum(equal[:QUESTIONS]) >= QUESTIONS - 1
    off = [logprob_difference(*answers) for answers in zip(one.tokens, one.logits, two.tokens, two.logits, strict=True)]
    assert torch.cat(off).mean() < LOGPROB


def logprob_difference(tokens: list[int], logits: Tensor, others: list[int], other_logits: Tensor) -> Tensor:
    """Of the tokens of an answer, until two answers part ways."""
    same = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), len(tokens) - 1) + 1
    told, other = (torch.log_softmax(each[:same], dim=-1) for each in (logits, other_logits))
    return (told - other)[range(same), tokens[:same]].abs()


def test_all_ranks_choose_the_same_experts(cut: Any) -> None:
    """Of the groups whose input is cut, too."""
    one, two = cut["qe-extract-w4a6"].experts
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert len(torch.cat(one).unique()) > 2


def test_a_group_that_cannot_be_cut_is_named(cut: Any) -> None:
    assert cut["rtn-w4a16g128"] == (
        "model.language_model.layers.0.mlp.down: the 320 inputs of a rank do not divide into groups of 128; "
        "choose another tp_size, or load it whole"
    )


def test_channels_that_every_rank_would_choose_for_itself_are_refused(cut: Any) -> None:
    assert cut[OUTLIERS] == (
        "model.language_model.layers.0.self_attn.o: w4a6k64 has dynamic outlier channels, and each of 2 ranks would "
        "choose them in its own slice of a token: the answers would depend on the number of ranks; choose another "
        "tp_size, or load it whole"
    )


@pytest.fixture
def plan(checkpoints: dict[str, Path]) -> Any:
    """plan(recipe, change, **sizes): what is said to a model that is to be cut like that."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.distributed import DistributedConfig

    def make(recipe: str, change: Any = lambda model, layouts: None, **sizes: Any) -> Any:
        config = AutoConfig.from_pretrained(checkpoints[recipe])
        layouts = list(Layout.from_json(config.quantization_config).blocks)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        change(model, layouts)
        assert transformers_tp.plan(model, layouts, DistributedConfig(**sizes))
        return model.tp_plan

    return make


def test_the_rest_of_the_plan_stays_transformers_own(plan: Any) -> None:
    styles = plan("qe-extract-w4a6", tp_size=2)
    assert styles["model.language_model.layers.*.self_attn.q_proj"] == "qe_column"
    assert styles["model.language_model.layers.*.mlp.down_proj"] == "qe_row"
    assert styles["model.language_model.layers.*.mlp.down_input"] == "qe_row_input"
    assert not any(style in ("colwise", "rowwise") for style in styles.values())


def test_what_we_cannot_cut_is_refused(plan: Any) -> None:
    def no_plan(model: Any, layouts: Any) -> None:
        model.tp_plan.clear()

    def own_routers(model: Any, layouts: Any) -> None:
        layouts[2] = changed(layouts[2], router_input="mlp.down")

    def wider_blocks(model: Any, layouts: Any) -> None:
        factors = {f"rotation_{i}": TensorSpec("int8", (size, size)) for i, size in enumerate((20, 32))}
        layouts[0] = changed(layouts[0], input={**layouts[0].groups["mlp.down"].input, **factors})

    def changed(block: BlockLayout, **change: Any) -> BlockLayout:
        return BlockLayout({**block.groups, "mlp.down": replace(block.groups["mlp.down"], **change)})

    assert plan(ROTATED, tp_size=2)["model.language_model.layers.*.mlp.down_proj"] == "qe_row"
    with pytest.raises(ConfigError, match=r"mlp.down: its rotation at run time mixes blocks of 640 .* a rank has 320"):
        plan(ROTATED, wider_blocks, tp_size=2)
    with pytest.raises(ConfigError, match="num_attention_heads=8 does not divide over 3 ranks; choose another tp_size"):
        plan("qe-extract-w4a6", tp_size=3)
    with pytest.raises(ConfigError, match="num_key_value_heads=4 does not divide over 8 ranks"):
        plan("qe-extract-w4a6", tp_size=8)
    with pytest.raises(
        ConfigError, match=r"layers.0.self_attn.qkv: transformers 5\.\d+\.\d has no plan to cut self_attn.q_p"
    ):
        plan("qe-extract-w4a6", no_plan, tp_size=2)
    with pytest.raises(ConfigError, match=r"layers.[02].mlp.down: its router reads the input of mlp.down"):
        plan("qe-extract-w4a6", own_routers, tp_size=2)
    with pytest.raises(ConfigError, match="fsdp_size=2: a quantized checkpoint is cut by tp_size alone"):
        plan("qe-extract-w4a6", fsdp_size=2)
    with pytest.raises(ConfigError, match="tp_plan: a quantized checkpoint has one way to be cut"):
        plan("qe-extract-w4a6", tp_size=2, tp_plan={"model.language_model.layers.*.mlp.down_proj": "rowwise"})


def test_a_part_is_not_saved_as_if_it_were_the_whole(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(checkpoints[OUTLIERS])
    model.hf_quantizer.cut = True  # as it is on every rank
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
