"""What runs a group on a GPU gives what the plain formula gives, for all that a recipe can ask for.

The kernels run in Triton's interpreter, and their references, which the ops choose on a CPU, beside them.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from qe_kernels import layout, ops
from qe_kernels.dispatch import Device
from torch import Tensor

from qe_dist.core.quantized import Factor, GroupInput, input_from_tensors, input_tensors
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.factors import store_factor
from qe_dist.numerics.hadamard import online_factors, rotate_blocks, unit
from qe_dist.numerics.packing import pack
from qe_dist.numerics.sharding import cut, inputs_dim, local_channels
from qe_dist.serve import on_kernels, on_reference
from qe_dist.serve.group import Group, backend

Normal = Callable[..., Tensor]
TOKENS, INPUTS, OUTPUTS, RANK, EXPERTS, GROUP = 9, 256, 80, 16, 3, 64
SCHEMES = ["w4a16g64", "w3a16", "w4a8", "w4a6g64", "w4a4k8", "w2a8k4g64"]
GPU = Device("interpreter", (8, 0), processors=2)
BF16 = 2.0**-7
"""Two roundings."""


@pytest.fixture(params=["references", "interpreter"])
def ran_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "interpreter":
        monkeypatch.setattr(ops, "device_of", lambda device: GPU)
        monkeypatch.setattr(on_kernels, "order_for", lambda device: layout.order_for(GPU.capability))
    return request.param


def channels(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def powers_of_two(x: Tensor) -> Tensor:
    """Which change no digit of bf16: a token is rounded to the same codes then, before and after."""
    return x.round().exp2().bfloat16()


def whole_input(normal: Normal, bits: int) -> GroupInput:
    return GroupInput(
        input_scale=powers_of_two(normal(1, 1, INPUTS)),
        shared_down=store_factor(normal(2, RANK, INPUTS) / 16, bits),
        shared_channels=channels(3, 200),
        expert_down=store_factor(normal(3, EXPERTS, RANK, INPUTS) / 16, bits),
        expert_channels=channels(0, 5, 255, 31, 2, 11, 130, 133, 134).view(3, 3),
        router=normal(4, EXPERTS, INPUTS).abs().bfloat16(),
        salient_channels=channels(9, 190),
    )


def branches(normal: Normal, bits: int) -> dict[str, Factor | Tensor]:
    return {
        "shared_up": store_factor(normal(7, OUTPUTS, RANK) / 4, bits),
        "shared_columns": normal(8, OUTPUTS, 2).bfloat16(),
        "expert_up": store_factor(normal(9, EXPERTS, OUTPUTS, RANK) / 4, bits),
        "expert_columns": normal(10, EXPERTS, OUTPUTS, 3).bfloat16(),
        "salient_columns": store_factor(normal(11, OUTPUTS, 2), bits),
    }


def weight(normal: Normal, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Words and scales."""
    top = 2 ** (scheme.weight_bits - 1)
    codes = (top / 2 * normal(5, OUTPUTS, INPUTS)).round().clamp(-top, top - 1).to(torch.int8)
    groups = INPUTS // (scheme.group_size or INPUTS)
    return pack(codes, scheme.weight_bits), (normal(6, OUTPUTS, groups).abs() / top / 8).bfloat16()


def tokens(normal: Normal) -> Tensor:
    """With an outlier channel."""
    return (normal(0, TOKENS, INPUTS) * (1 + 20 * (torch.arange(INPUTS) == 7))).bfloat16()


def run(by, scheme: Scheme, part: GroupInput, repair: dict, words: Tensor, scale: Tensor, x: Tensor, bias=None):
    """One linear of one group whose router, if there is one, reads the group's own input."""
    group = Group(by.Input(part, scheme, x.shape[1]))
    if part.router is not None:
        group.choose_for(group, part.router)
    linear = by.Linear(words.clone(), scale, repair, scheme, x.shape[1])
    return linear(group.prepare(x), bias, x.dtype)


def close(found: Tensor, wanted: Tensor) -> bool:
    """bf16 operands; the size of the sum decides, not that of what is left of it."""
    return bool((found.double() - wanted.double()).norm() <= BF16 * wanted.double().norm())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_kernels_give_what_the_formula_gives(ran_by: str, normal: Normal, scheme: str, bits: int) -> None:
    one, x = Scheme.parse(scheme), tokens(normal)
    what = (
        one,
        whole_input(normal, bits),
        branches(normal, bits),
        *weight(normal, one),
        x,
        normal(12, OUTPUTS).bfloat16(),
    )
    found, wanted = run(on_kernels, *what), run(on_reference, *what)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert close(found, wanted)


@pytest.mark.parametrize(
    "left_out", ["input_scale", "shared_down", "shared_channels", "expert_down", "expert_channels"]
)
def test_what_a_recipe_has_not_is_not_missed(ran_by: str, normal: Normal, left_out: str) -> None:
    one, x = Scheme.parse("w4a8"), tokens(normal)
    part, repair = replace(whole_input(normal, 8), **{left_out: None}), branches(normal, 8)
    repair.pop(left_out.replace("down", "up").replace("channels", "columns"), None)
    what = (one, part, repair, *weight(normal, one), x)
    assert close(run(on_kernels, *what), run(on_reference, *what))


@pytest.mark.parametrize("scheme", ["w4a8", "w4a6g64", "w4a16g64"])
def test_a_list_of_channels_alone(ran_by: str, normal: Normal, scheme: str) -> None:
    one, x = Scheme.parse(scheme), tokens(normal)
    part = GroupInput(shared_channels=channels(7, 200))
    what = (one, part, {"shared_columns": branches(normal, 16)["shared_columns"]}, *weight(normal, one), x)
    assert close(run(on_kernels, *what), run(on_reference, *what))


@pytest.mark.parametrize("scheme", ["w4a8", "w4a6", "w4a16g64"])
def test_a_rotation_comes_first(ran_by: str, normal: Normal, scheme: str) -> None:
    """And is rounded to 16 bits by the kernels' side alone, which is one rounding more. A router reads what it did."""
    one, x = Scheme.parse(scheme), tokens(normal)
    part = replace(whole_input(normal, 8), expert_down=None, expert_channels=None, router=None)
    turned = replace(part, rotation=online_factors(INPUTS))
    repair = {name: t for name, t in branches(normal, 8).items() if "expert" not in name}
    what = (repair, *weight(normal, one))
    found, wanted = (run(by, one, turned, *what, x) for by in (on_kernels, on_reference))
    rotated = rotate_blocks(x.float(), unit(turned.rotation, torch.float32)).to(x.dtype)
    assert close(found, run(on_reference, one, part, *what, rotated))
    assert (found.double() - wanted.double()).norm() <= 2 * BF16 * wanted.double().norm()
    assert not close(found, run(on_reference, one, part, *what, x))


def test_the_bare_weight(ran_by: str, normal: Normal) -> None:
    one, x = Scheme.parse("w4a16g64"), tokens(normal)
    what = (one, GroupInput(), {}, *weight(normal, one), x)
    assert close(run(on_kernels, *what), run(on_reference, *what))


def test_scales_and_experts_by_modality(ran_by: str, normal: Normal) -> None:
    one, x = Scheme.parse("w4a8"), tokens(normal)
    part = GroupInput(
        input_scale=powers_of_two(normal(1, 2, INPUTS)),
        expert_down=store_factor(normal(3, 1, RANK, INPUTS) / 16, 16),
    )
    repair = {"expert_up": store_factor(normal(9, 1, OUTPUTS, RANK) / 4, 16)}
    modality = torch.arange(TOKENS).remainder(2).to(torch.int8)
    words, scale = weight(normal, one)
    found, wanted = (
        by.Linear(words.clone(), scale, repair, one, INPUTS)(
            Group(by.Input(part, one, INPUTS)).prepare(x, modality), None, x.dtype
        )
        for by in (on_kernels, on_reference)
    )
    assert close(found, wanted)


@pytest.mark.parametrize("scheme", ["w4a16g64", "w3a8"])
@pytest.mark.parametrize("by", [on_kernels, on_reference])
def test_the_words_of_the_checkpoint_come_back(by, normal: Normal, scheme: str) -> None:
    one = Scheme.parse(scheme)
    words, scale = weight(normal, one)
    assert torch.equal(by.Linear(words.clone(), scale, {}, one, INPUTS).words(), words)


def test_a_group_chooses_for_its_readers_in_one_go(ran_by: str, normal: Normal) -> None:
    """As those of qkv do for o, whose own input is cut among ranks."""
    x, routers = tokens(normal), normal(4, 2, EXPERTS, INPUTS).abs().bfloat16()
    for by in (on_kernels, on_reference):
        source, reader = (Group(by.Input(GroupInput(), Scheme(4), INPUTS)) for _ in range(2))
        source.choose_for(source, routers[0])
        source.choose_for(reader, routers[1])
        source.prepare(x)
        assert reader.expert.tolist() == (x.double().abs() @ routers[1].double().T).argmin(dim=1).tolist()
        assert source.expert is None, "used by itself"


@pytest.mark.parametrize("scheme", ["w4a16g64", "w4a16"])
def test_ranks_add_up(ran_by: str, normal: Normal, scheme: str) -> None:
    """Row-parallel: channels of other ranks are nobody's here. The router reads what all ranks have."""
    one, x, size = Scheme.parse(scheme), tokens(normal), 2
    part, repair, (words, scale) = whole_input(normal, 8), branches(normal, 8), weight(normal, one)
    expert = on_reference.Input(part, one, INPUTS).choose(part.router[None], x)[0].int()
    width, total = INPUTS // size, torch.zeros(TOKENS, OUTPUTS, dtype=torch.float64)
    for rank in range(size):
        own = {n: cut(t, inputs_dim(n, t.shape), rank, size).contiguous() for n, t in input_tensors(part).items()}
        own_part = input_from_tensors(local_channels(own, width, rank))
        mine = {"weight_packed": words, "weight_scale": scale}
        mine = {n: cut(t, inputs_dim(n, t.shape), rank, size).contiguous() for n, t in mine.items()}
        group = Group(on_kernels.Input(own_part, one, width))
        group.expert = expert
        linear = on_kernels.Linear(mine["weight_packed"], mine["weight_scale"], repair, one, width)
        total += linear(group.prepare(cut(x, 1, rank, size)), None, x.dtype).double()
    assert close(total, run(on_reference, one, part, repair, words, scale, x))


def test_torch_compile_makes_one_graph_of_groups_that_choose_for_each_other(normal: Normal) -> None:
    """As vLLM does with a whole model, whatever the number of tokens. (It compiles the formula too, but here its shapes
    are checked at run time, which cannot be traced.)"""
    by = on_kernels
    one, x = Scheme.parse("w4a8"), tokens(normal)
    part, repair, (words, scale) = whole_input(normal, 8), branches(normal, 8), weight(normal, one)
    part = replace(part, rotation=online_factors(INPUTS))
    first, second = (Group(by.Input(part, one, INPUTS)) for _ in range(2))
    first.choose_for(first, part.router)
    first.choose_for(second, part.router.flip(0))
    linears = [by.Linear(words.clone(), scale, repair, one, INPUTS) for _ in range(2)]

    def block(x: Tensor) -> Tensor:
        y = linears[0](first.prepare(x), None, x.dtype)
        return y + linears[1](second.prepare(x + 1), None, x.dtype)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (TOKENS, 4):
        assert torch.equal(compiled(x[:count]), block(x[:count]))
    assert first.expert is None
    assert second.expert is None


def test_a_cpu_runs_the_formula() -> None:
    assert backend(torch.device("cpu"), torch.bfloat16) is on_reference
