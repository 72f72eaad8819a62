"""Everything that a recipe can produce goes to named tensors and comes back."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qe_dist.core.quantized import (
    Factor,
    GroupInput,
    QuantizedLinear,
    all_finite,
    input_from_tensors,
    input_tensors,
    num_bytes,
    repair_from_tensors,
    repair_tensors,
)

Normal = Callable[..., Tensor]


@pytest.fixture(params=["bf16", "int8", "int4"])
def factor(request: pytest.FixtureRequest, normal: Normal) -> Callable[..., Factor]:
    def make(seed: int, *shape: int) -> Factor:
        values = normal(seed, *shape)
        if request.param == "bf16":
            return Factor(values.bfloat16())
        if request.param == "int4":
            return Factor((values * 40 + 128).clamp(0, 255).to(torch.uint8), normal(seed + 100, *shape[:-1]).bfloat16())
        return Factor((values * 40).clamp(-127, 127).to(torch.int8), normal(seed + 100, *shape[:-1]).bfloat16())

    return make


@pytest.fixture
def full_input(factor: Callable[..., Factor], normal: Normal) -> GroupInput:
    return GroupInput(
        input_scale=normal(0, 2, 16).bfloat16(),
        shared_down=factor(1, 3, 16),
        shared_channels=torch.tensor([4, 1], dtype=torch.int32),
        expert_down=factor(2, 5, 3, 16),
        expert_channels=torch.tensor([[0], [2], [3], [5], [6]], dtype=torch.int32),
        router=normal(3, 5, 24).bfloat16(),
        salient_channels=torch.tensor([9, 3, 0, 8], dtype=torch.int32),
        rotation=tuple(normal(s, n, n).sign().to(torch.int8) for s, n in enumerate((4, 2, 2), 20)),
    )


@pytest.fixture
def full_linear(factor: Callable[..., Factor], normal: Normal) -> QuantizedLinear:
    return QuantizedLinear(
        codes=(3 * normal(10, 10, 16)).clamp(-8, 7).to(torch.int8),
        scale=normal(4, 10, 2).abs().bfloat16(),
        bias=normal(5, 10).bfloat16(),
        shared_up=factor(6, 10, 3),
        shared_columns=normal(7, 10, 2).bfloat16(),
        expert_up=factor(8, 5, 10, 3),
        expert_columns=normal(9, 5, 10, 1).bfloat16(),
        salient_columns=factor(11, 10, 4),
    )


def test_an_input_survives(full_input: GroupInput, same: Callable[[Any, Any], bool]) -> None:
    assert same(input_from_tensors(input_tensors(full_input)), full_input)


def test_a_linear_survives(full_linear: QuantizedLinear, same: Callable[[Any, Any], bool]) -> None:
    back = QuantizedLinear(full_linear.codes, full_linear.scale, **repair_from_tensors(repair_tensors(full_linear)))
    assert same(back, full_linear)


def test_names_on_disk(full_input: GroupInput, full_linear: QuantizedLinear) -> None:
    """Changing one makes every checkpoint out there unreadable."""

    def with_scales(*names: str) -> set[str]:
        return {*names, *(f"{n}_scale" for n in names if full_input.shared_down.scale is not None)}

    plain = {"input_scale", "lr_shared_channels", "lr_expert_channels", "lr_salient_channels", "router"}
    plain |= {"rotation_0", "rotation_1", "rotation_2"}
    assert set(input_tensors(full_input)) == with_scales("lr_shared_a", "lr_expert_a") | plain
    plain = {"bias", "lr_shared_columns", "lr_expert_columns"}
    assert set(repair_tensors(full_linear)) == with_scales("lr_shared_b", "lr_expert_b", "lr_salient_columns") | plain


def test_what_is_absent_stays_absent() -> None:
    assert input_tensors(GroupInput()) == {}
    assert input_from_tensors({}) == GroupInput()
    assert repair_from_tensors({}) == {}


@pytest.mark.parametrize("absent", ["input_scale", "shared_down", "expert_channels", "router", "salient_channels"])
def test_any_part_may_be_absent(full_input: GroupInput, same: Callable[[Any, Any], bool], absent: str) -> None:
    part = GroupInput(**{**vars(full_input), absent: None})
    assert same(input_from_tensors(input_tensors(part)), part)


def test_foreign_tensors_of_the_module_are_left_alone(full_linear: QuantizedLinear) -> None:
    tensors = repair_tensors(full_linear) | {"weight_packed": full_linear.codes, "weight_scale": full_linear.scale}
    assert set(repair_from_tensors(tensors)) == {
        "bias",
        "shared_up",
        "shared_columns",
        "expert_up",
        "expert_columns",
        "salient_columns",
    }


def test_tensors_are_contiguous_for_the_file(normal: Normal) -> None:
    part = GroupInput(shared_down=Factor(normal(0, 16, 3).T), router=normal(1, 16, 5).T)
    assert all(tensor.is_contiguous() for tensor in input_tensors(part).values())


@pytest.mark.parametrize("counted", ["router", "expert_down", "expert_channels"])
def test_any_part_of_the_experts_tells_their_number(full_input: GroupInput, counted: str) -> None:
    others = {"router", "expert_down", "expert_channels"} - {counted}
    assert replace(full_input, **dict.fromkeys(others)).num_experts == 5
    assert GroupInput().num_experts == 0


@pytest.mark.parametrize(
    ("absent", "rows", "by_modality"),
    [
        ([], 2, True),  # scales of their own
        ([], 1, False),
        (["router"], 1, True),  # experts that nobody else can choose
        (["router", "expert_down"], 1, True),
        (["router", "expert_down", "expert_channels"], 1, False),
        (["router", "expert_down", "expert_channels"], 2, True),
        (["router", "expert_down", "expert_channels", "input_scale"], 1, False),
    ],
)
def test_what_must_know_the_modality_of_a_token(
    full_input: GroupInput, absent: list[str], rows: int, by_modality: bool
) -> None:
    part = replace(full_input, input_scale=full_input.input_scale[:rows])
    assert replace(part, **dict.fromkeys(absent)).by_modality is by_modality


def test_an_int8_factor_is_values_times_a_scale_per_row() -> None:
    factor = Factor(torch.tensor([[[1, -2], [3, 4]]], dtype=torch.int8), torch.tensor([[0.5, 2.0]]))
    assert factor.dense.tolist() == [[[0.5, -1.0], [6.0, 8.0]]]


def test_an_int4_factor_is_two_columns_to_a_byte() -> None:
    factor = Factor(torch.tensor([[0x98, 0x1F], [0x88, 0xA8]], dtype=torch.uint8), torch.tensor([0.5, 2.0]))
    assert factor.dense.tolist() == [[0.0, 0.5, 3.5, -3.5], [0.0, 0.0, 0.0, 4.0]]


def test_bytes_are_those_of_the_stored_types() -> None:
    tensors = {"codes": torch.zeros(3, 5, dtype=torch.int8), "scale": torch.zeros(3, 2, dtype=torch.bfloat16)}
    assert num_bytes(tensors) == 3 * 5 + 2 * 3 * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_single_bad_number_is_seen(bad: float) -> None:
    healthy = {"up": torch.zeros(3, 4), "channels": torch.zeros(2, dtype=torch.int32)}
    sick = torch.zeros(3, 4)
    sick[1, 2] = bad
    assert all_finite(healthy)
    assert not all_finite(healthy | {"down": sick})
