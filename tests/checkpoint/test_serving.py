"""Which tensor-parallel sizes can serve a checkpoint is known before it is made, and proved after."""

import math
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qe_dist import archs
from qe_dist.checkpoint import tp_check
from qe_dist.checkpoint.serving import served_sizes, serving_problems
from qe_dist.checkpoint.tp_check import check_ranks
from qe_dist.checkpoint.verify import Checkpoint
from qe_dist.core.errors import ConfigError
from qe_dist.core.layout import BlockLayout, GroupLayout, Layout
from qe_dist.core.scheme import Scheme
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.methods.recipes import load_recipe, recipe_from
from qe_dist.numerics.sharding import padding_step, why_not
from tests.tiny import calibration, tiny_model

RECIPES = (
    "rtn-w4a16g16", "gptq+qera-w4a6@0.25f4", "qe-extract-w4a6", "serq-w4a8", "qera-w3a16g32", "aser-w4a4",
    "lists+gptq+qera-w4a6g16",
)  # fmt: skip
LARGE = {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8}
SMALL = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}


OWN = {"name": "quant_experts", "num_experts": 2, "router_input": "own"}


def published(size, scheme, **changes):
    """config.json of a checkpoint of Qwen2-VL 72B or 7B, quantized in groups without a repair."""
    config = {"model_type": "qwen2_vl", "vision_config": {"num_heads": 16}} | size | changes
    groups = {
        group.name: GroupLayout(Scheme.parse(scheme), group.router_input, {}, {x.name: {} for x in group.linears})
        for group in archs.get("qwen2_vl").groups(config)
    }
    return config | {"quantization_config": Layout((BlockLayout(groups),)).to_json()}


@pytest.mark.parametrize(
    ("config", "size", "said"),
    [
        (published(LARGE, "w4a16g128"), 1, ()),
        (published(LARGE, "w4a16g128"), 2, ("mlp.down: the 14784 inputs of a rank do not divide into groups of 128",)),
        (published(LARGE, "w4a8"), 8, ()),
        (published(LARGE, "w4a16g128", intermediate_size=29696), 8, ()),
        (published(LARGE, "w4a8", intermediate_size=29696), 16, ()),  # two ranks share a key-value head
        (published(SMALL, "w4a8"), 4, ()),
        (published(SMALL, "w4a8"), 3, (
            "the 16 heads of the vision tower do not divide over 3 ranks",
            "self_attn.qkv: the 28 heads of self_attn.q_proj do not divide over 3 ranks",
            "self_attn.o: the 28 heads of self_attn.o_proj do not divide over 3 ranks",
            "mlp.gate_up: the 18944 outputs of mlp.gate_proj do not divide over 3 ranks",
            "mlp.down: its 18944 inputs do not divide over 3 ranks",
        )),
        (published(SMALL, "w4a8k64"), 1, ()),
        (published(SMALL, "w4a8k64"), 2, tuple(
            f"{name}: w4a8k64 has dynamic outlier channels, and each of 2 ranks would choose them in its own slice of "
            "a token: the answers would depend on the number of ranks"
            for name in ("self_attn.o", "mlp.down")
        )),
        (published(SMALL | {"num_key_value_heads": 14}, "w4a8"), 4, (
            "self_attn.qkv: the 14 heads of self_attn.k_proj do not divide over 4 ranks",
        )),
    ],
)  # fmt: skip
def test_what_cannot_be_dealt_out_is_named(config, size, said):
    assert serving_problems(config, size) == said


def test_all_sizes_are_told_in_a_sentence():
    assert served_sizes(published(SMALL, "w4a8")) == (
        "tensor-parallel sizes that can be served: 1, 2, 4; 8 is not: "
        "self_attn.qkv: the 28 heads of self_attn.q_proj do not divide over 8 ranks"
    )


def test_what_is_no_checkpoint_and_no_size_is_refused():
    with pytest.raises(ConfigError, match="no quantization_config of qe_dist"):
        serving_problems(LARGE | {"model_type": "qwen2_vl"}, 2)
    with pytest.raises(ConfigError, match="must be at least 1, found 0"):
        serving_problems(published(LARGE, "w4a8"), 0)


@pytest.mark.parametrize(
    ("width", "scheme", "size", "padded"),
    [
        (29568, "w4a16g128", 1, 29568),
        (29568, "w4a16g128", 8, 29696),
        (29568, "w4a8", 2, 29568),
        (29568, "w4a8", 8, 29696),
        (640, "w4a16g64", 2, 640),
        (640, "w4a16g128", 2, 768),
    ],
)
def test_widths_are_padded_as_little_as_groups_and_tiles_allow(width, scheme, size, padded):
    step = padding_step(Scheme.parse(scheme), size)
    assert math.ceil(width / step) * step == padded


@given(st.integers(2, 8), st.sampled_from([None, 8, 32, 96, 128]), st.integers(2, 9), st.integers(1, 40))
def test_what_is_padded_can_be_cut(bits, group, size, times):
    scheme = Scheme(bits, None, group)
    assert why_not(scheme, {"down": 64}, times * padding_step(scheme, size), "row", size) is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A recipe each of groups, grids, routed experts, extracted and salient channels and odd words."""
    root = tmp_path_factory.mktemp("runs")
    tiny = dict(archs.get("qwen2_vl").tiny)
    four_heads = tiny | {"vision_config": tiny["vision_config"] | {"num_heads": 4}}
    model, data = tiny_model(root / "model", config=four_heads), calibration(root / "data", 4)
    made = {
        name: RunConfig(
            model, load_recipe(name), data, root / name,
            samples_per_batch=2, sample_tokens=64, tensor_parallel_size=2,
        )
        for name in RECIPES
    }  # fmt: skip
    made |= {
        name: replace(made["gptq+qera-w4a6@0.25f4"], recipe=recipe, output=root / name, tensor_parallel_size=1)
        for name, recipe in (
            ("masquant", load_recipe("masquant-w4a6")),
            ("linear", recipe_from({"scheme": "w4a8", "granularity": "linear"})),
            ("own", recipe_from({"scheme": "w4a8", "compensation": OWN})),
        )
    }
    quantize(*(made[name] for name in RECIPES))
    quantize(made["masquant"])
    quantize(made["linear"], made["own"])
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_ranks_compute_together_what_the_whole_does(runs, name):
    checkpoint = Checkpoint.open(runs[name].output)
    sizes = [size for size in (1, 2, 4) if not serving_problems(checkpoint.config, size)]
    assert sizes == ([1, 2] if name == "qera-w3a16g32" else [1, 2, 4])  # four ranks: two share a key-value head
    assert list(check_ranks(checkpoint, sizes)) == []


def in_reverse(right):
    return lambda tensor, dim, rank, size: right(tensor, dim, size - 1 - rank, size)


def but_not_scales(right):
    return lambda tensor, dim, rank, size: right(tensor, dim, 0 if tensor.is_floating_point() else rank, size)


def of_the_first(right):
    return lambda tensors, width, rank: right(tensors, width, 0)


@pytest.mark.parametrize(
    ("name", "rule", "wrong", "linear"),
    [
        ("rtn-w4a16g16", "cut", in_reverse, "up_proj"),
        ("rtn-w4a16g16", "cut", but_not_scales, "down_proj"),
        ("aser-w4a4", "cut", but_not_scales, "o_proj"),
        ("qera-w3a16g32", "cut", but_not_scales, "v_proj"),
        ("qe-extract-w4a6", "local_channels", of_the_first, "down_proj"),
        ("serq-w4a8", "local_channels", of_the_first, "down_proj"),
        ("lists+gptq+qera-w4a6g16", "local_channels", of_the_first, "down_proj"),
    ],
)
def test_a_wrong_rule_is_seen_and_the_linear_named(runs, monkeypatch, name, rule, wrong, linear):
    monkeypatch.setattr(tp_check, rule, wrong(getattr(tp_check, rule)))
    faults = list(check_ranks(Checkpoint.open(runs[name].output), [2]))
    assert any(size == 2 and f"{linear} over 2 ranks" in fault for size, fault in faults)
    assert all(fault.startswith("model.layers.") for _, fault in faults)


def test_an_output_that_is_off_is_said_by_how_much(runs, monkeypatch):
    """One rank's part of one output, a tenth off."""
    right = tp_check.linear_forward

    def off(linear, x, weight=None):
        y = right(linear, x, weight)
        y[:, 3] *= 1 if weight is not None else 1.1
        return y

    monkeypatch.setattr(tp_check, "linear_forward", off)
    faults = [fault for _, fault in check_ranks(Checkpoint.open(runs["rtn-w4a16g16"].output), [2])]
    assert (
        "model.layers.1.mlp.down: mlp.down_proj over 2 ranks is off by 1.0e-01 of an output, 1e-04 is rounding"
        in faults
    )


def test_a_grid_that_is_coarser_than_asked_is_seen(runs, monkeypatch):
    """Ranks and whole agree, but not with the product in full precision."""
    rounded, prepared = tp_check.round_activations, tp_check.prepare

    def coarser(scheme):
        return scheme if scheme.act_bits is None else replace(scheme, act_bits=3)

    monkeypatch.setattr(tp_check, "round_activations", lambda x, scheme: rounded(x, coarser(scheme)))
    monkeypatch.setattr(tp_check, "prepare", lambda part, x, expert, scheme: prepared(part, x, expert, coarser(scheme)))
    faults = [fault for _, fault in check_ranks(Checkpoint.open(runs["gptq+qera-w4a6@0.25f4"].output), [2])]
    assert any("is further off the product than its activation grid explains" in fault for fault in faults)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("masquant", "treats text and image tokens differently, which vLLM does not know; serve with transformers"),
        ("linear", "fitted by itself, but vLLM computes the linears of one input at once; fit them as a group"),
    ],
)
def test_what_vllm_does_not_know_is_served_at_no_size(runs, name, said):
    config = Checkpoint.open(runs[name].output).config
    assert all(any(said in problem for problem in serving_problems(config, size)) for size in (1, 2))
    assert served_sizes(config).startswith("tensor-parallel sizes that can be served: none; 1 is not: ")


@pytest.mark.parametrize(
    ("size", "recipe", "said"),
    [
        (3, "rtn-w4a8", "the 4 heads of the vision tower do not divide over 3 ranks"),
        (4, "rtn-w4a16g32", "self_attn.o: the 16 inputs of a rank do not divide into groups of 32"),
        (2, "gptq-w4a6k64", "self_attn.o: w4a6k64 has dynamic outlier channels, .* depend on the number of ranks"),
    ],
)
def test_a_run_for_more_ranks_than_can_serve_it_is_refused_before_any_work(runs, tmp_path, size, recipe, said):
    run = replace(runs["rtn-w4a16g16"], recipe=load_recipe(recipe), output=tmp_path / "out", tensor_parallel_size=size)
    with pytest.raises(ConfigError, match=rf"at --tensor-parallel-size {size} .* could not be served: {said}"):
        quantize(run)
    assert not run.output.exists()


def test_recipes_by_linear_are_refused_for_more_ranks(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"self_attn\.q_proj: fitted by itself"):
        quantize(replace(runs["linear"], output=tmp_path / "out", tensor_parallel_size=2))


def test_a_router_that_reads_what_a_rank_has_in_part_is_served_by_one_rank_alone(runs, tmp_path):
    config = Checkpoint.open(runs["own"].output).config
    said = "{}: its router reads the input of {}, of which a rank has only a part"
    assert serving_problems(config, 1) == ()
    assert serving_problems(config, 2) == (
        said.format("self_attn.o", "self_attn.o_proj"),
        said.format("mlp.down", "mlp.down_proj"),
    )
    with pytest.raises(ConfigError, match=r"could not be served: self_attn\.o: its router reads the input"):
        quantize(replace(runs["own"], output=tmp_path / "out", tensor_parallel_size=2))


def test_recipes_by_modality_are_refused_for_more_ranks(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"the recipe treats text and image tokens differently.* Choose another size"):
        quantize(replace(runs["masquant"], output=tmp_path / "out", tensor_parallel_size=2))


def test_the_command_proves_the_sizes_that_it_is_asked_for(runs, verify):
    code, out, _ = verify(runs["qe-extract-w4a6"].output, "--tensor-parallel-size", "1,2,4")
    assert code == 0
    assert out.splitlines()[-3:] == [
        f"ok       tensor-parallel size {n}: ranks agree with the whole" for n in (1, 2, 4)
    ]


def test_the_command_ends_with_1_where_a_size_cannot_be_served(runs, verify):
    code, out, err = verify(runs["rtn-w4a16g16"].output, "--tensor-parallel-size", "2,8")
    assert code == 1
    assert "no       tensor-parallel size 8 cannot be served" in out
    assert "         self_attn.o: the 4 heads of self_attn.o_proj do not divide over 8 ranks" in out
    assert "ok       tensor-parallel size 2: ranks agree with the whole" in out
    assert "cannot be served at --tensor-parallel-size 8, as said above" in err


@pytest.mark.parametrize("text", ["", "two", "0", "1,-2", "1,,2"])
def test_other_words_than_sizes_are_refused(runs, verify, text):
    code, _, err = verify(runs["gptq+qera-w4a6@0.25f4"].output, f"--tensor-parallel-size={text}")
    assert code == 2
    assert "--tensor-parallel-size must be numbers of ranks like 1,2,4,8" in err


def test_a_damaged_checkpoint_is_not_cut(runs, verify, tmp_path):
    copy = shutil.copytree(runs["gptq+qera-w4a6@0.25f4"].output, tmp_path / "copy")
    path = copy / "block-00000.safetensors"
    held = load_file(path)
    held.pop("model.layers.0.mlp.down_proj.weight_scale")
    save_file(held, path, metadata={"format": "pt"})
    code, out, _ = verify(copy, "--tensor-parallel-size", "2")
    assert code == 1
    assert "skipped  images, names and tensor parallelism: a damaged checkpoint is not loaded" in out
