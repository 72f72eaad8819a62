"""The reference forward against the formula of a quantized linear, one token at a time in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qe_dist.core.quantized import Factor, GroupInput, QuantizedLinear
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.factors import store_factor
from qe_dist.numerics.hadamard import online_factors
from qe_dist.numerics.reference import linear_forward, prepare, route

Normal = Callable[..., Tensor]

TOKENS, INPUTS, OUTPUTS, RANK, EXPERTS = 40, 32, 20, 6, 4
SALIENT_CHANNELS = torch.tensor([9, 2, 31, 30], dtype=torch.int32)
SHARED_CHANNELS = torch.tensor([9, 30], dtype=torch.int32)
EXPERT_CHANNELS = torch.tensor([[0, 5, 7], [31, 2, 11], [1, 3, 5], [8, 12, 20]], dtype=torch.int32)


def dense(factor: Factor) -> Tensor:
    """The matrix that a factor stands for, in float64."""
    values = factor.values.double()
    if factor.values.dtype == torch.uint8:
        values = torch.stack([values % 16, values // 16], dim=-1).flatten(-2) - 8
    return values if factor.scale is None else values * factor.scale.double()[..., None]


def token_output(
    linear: QuantizedLinear, part: GroupInput, token: Tensor, expert: int, modality: int, bits: int | None
) -> Tensor:
    """y = Qa(x~ without extracted channels) W^T + (x~ A_s) B_s + (x~ A_e) B_e + x~[extracted] columns + bias
    + Qa(x~)[salient] salient_columns."""
    x = token.double()
    if part.rotation:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        for factor in part.rotation:
            matrix = torch.kron(matrix, factor.double())
        x = (x.view(-1, len(matrix)) @ matrix / len(matrix) ** 0.5).flatten()
    if part.input_scale is not None:
        x = x / part.input_scale.double()[modality if len(part.input_scale) > 1 else 0]
    base, y = x.clone(), torch.zeros(linear.codes.shape[0], dtype=torch.float64)
    if part.shared_down is not None:
        y += dense(linear.shared_up) @ (dense(part.shared_down) @ x)
    if part.shared_channels is not None:
        channels = part.shared_channels.tolist()
        y += linear.shared_columns.double() @ x[channels]
        base[channels] = 0.0
    if part.expert_down is not None and expert >= 0:
        y += dense(linear.expert_up)[expert] @ (dense(part.expert_down)[expert] @ x)
    if part.expert_channels is not None and expert >= 0:
        channels = part.expert_channels[expert].tolist()
        y += linear.expert_columns[expert].double() @ x[channels]
        base[channels] = 0.0
    if bits is not None:
        step = base.abs().max() / (2 ** (bits - 1) - 1)
        base = torch.round(base / step) * step
    if part.salient_channels is not None:
        y += dense(linear.salient_columns) @ base[part.salient_channels.tolist()]
    columns_per_scale = linear.codes.shape[1] // linear.scale.shape[1]
    weight = linear.codes.double() * linear.scale.double().repeat_interleave(columns_per_scale, dim=1)
    y += weight @ base
    return y if linear.bias is None else y + linear.bias.double()


@pytest.fixture
def x(normal: Normal) -> Tensor:
    """With two outlier channels, which some of the experts extract."""
    x = normal(0, TOKENS, INPUTS)
    x[:, [9, 5]] *= 30
    return x


@pytest.fixture
def modality() -> Tensor:
    return (torch.arange(TOKENS) % 2).to(torch.int8)


@pytest.fixture
def router(normal: Normal) -> Tensor:
    """Blind for the two outliers, which would decide everything; each expert likes every fourth channel."""
    liked = torch.arange(INPUTS) % EXPERTS == torch.arange(EXPERTS)[:, None]
    return (0.1 * normal(1, EXPERTS, INPUTS) - liked.float()).index_fill(1, torch.tensor([9, 5]), 0.0).bfloat16()


@pytest.fixture
def base(normal: Normal) -> dict[str, Tensor]:
    """Codes and scales of a w4g8 linear."""
    return {
        "codes": (4 * normal(2, OUTPUTS, INPUTS)).clamp(-8, 7).to(torch.int8),
        "scale": (0.02 * normal(3, OUTPUTS, INPUTS // 8).abs()).bfloat16(),
    }


def assert_follows_the_formula(
    linear: QuantizedLinear, part: GroupInput, x: Tensor, bits: int | None, modality: Tensor
) -> None:
    expert = route(part, x, modality)
    y = linear_forward(linear, prepare(part, x, expert, Scheme(4, bits), modality))
    assert y.dtype == torch.float32
    chosen = [-1] * len(x) if expert is None else expert.tolist()
    wanted = torch.stack(
        [token_output(linear, part, t, e, m, bits) for t, e, m in zip(x, chosen, modality.tolist(), strict=True)]
    )
    assert (y.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()  # float32


@pytest.mark.parametrize("bits", [None, 8, 6, 4])
@pytest.mark.parametrize("scales", [0, 1, 2])
@pytest.mark.parametrize("factor_bits", [16, 8, 4])
def test_all_parts_together(
    normal: Normal,
    x: Tensor,
    modality: Tensor,
    router: Tensor,
    base: dict[str, Tensor],
    bits: int | None,
    scales: int,
    factor_bits: int,
) -> None:
    part = GroupInput(
        input_scale=(normal(4, scales, INPUTS).abs() + 0.5).bfloat16() if scales else None,
        shared_down=store_factor(normal(5, RANK, INPUTS), factor_bits),
        shared_channels=SHARED_CHANNELS,
        expert_down=store_factor(normal(6, EXPERTS, RANK, INPUTS), factor_bits),
        expert_channels=EXPERT_CHANNELS,
        router=router,
        salient_channels=SALIENT_CHANNELS,
        rotation=online_factors(INPUTS),
    )
    linear = QuantizedLinear(
        **base,
        bias=normal(7, OUTPUTS).bfloat16(),
        shared_up=store_factor(0.1 * normal(8, OUTPUTS, RANK), factor_bits),
        shared_columns=normal(9, OUTPUTS, 2).bfloat16(),
        expert_up=store_factor(0.1 * normal(10, EXPERTS, OUTPUTS, RANK), factor_bits),
        expert_columns=normal(11, EXPERTS, OUTPUTS, 3).bfloat16(),
        salient_columns=store_factor(normal(12, OUTPUTS, 4), factor_bits),
    )
    assert route(part, x).unique().numel() == EXPERTS  # else the test would not see them all
    assert_follows_the_formula(linear, part, x, bits, modality)


@pytest.mark.parametrize("bits", [None, 6])
@pytest.mark.parametrize(
    "which", ["nothing", "shared factors", "shared channels", "factors", "channels", "salient", "rotation"]
)
def test_each_part_alone(
    normal: Normal, x: Tensor, modality: Tensor, router: Tensor, base: dict[str, Tensor], bits: int | None, which: str
) -> None:
    of_input, of_linear = {
        "nothing": ({}, {}),
        "shared factors": (
            {"shared_down": Factor(normal(5, RANK, INPUTS).bfloat16())},
            {"shared_up": Factor(normal(6, OUTPUTS, RANK).bfloat16())},
        ),
        "shared channels": ({"shared_channels": SHARED_CHANNELS}, {"shared_columns": normal(7, OUTPUTS, 2)}),
        "factors": (
            {"expert_down": Factor(normal(8, EXPERTS, RANK, INPUTS).bfloat16()), "router": router},
            {"expert_up": Factor(normal(9, EXPERTS, OUTPUTS, RANK).bfloat16())},
        ),
        "channels": (
            {"expert_channels": EXPERT_CHANNELS, "router": router},
            {"expert_columns": normal(10, EXPERTS, OUTPUTS, 3)},
        ),
        "rotation": ({"rotation": online_factors(INPUTS)}, {}),
        "salient": (
            {"salient_channels": SALIENT_CHANNELS},
            {"salient_columns": store_factor(normal(11, OUTPUTS, 4), 4)},
        ),
    }[which]
    assert_follows_the_formula(QuantizedLinear(**base, **of_linear), GroupInput(**of_input), x, bits, modality)


def test_without_a_router_there_is_no_route(x: Tensor) -> None:
    assert route(GroupInput(), x) is None
    assert route(GroupInput(), None) is None


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("scales", [1, 3])
@pytest.mark.parametrize("channels", [False, True])
def test_without_a_router_the_modality_is_the_expert_and_text_has_none(
    normal: Normal, x: Tensor, base: dict[str, Tensor], bits: int | None, scales: int, channels: bool
) -> None:
    modality = (torch.arange(TOKENS) % 3).to(torch.int8)  # text, and two other modalities
    part = GroupInput(
        input_scale=(normal(4, scales, INPUTS).abs() + 0.5).bfloat16(),
        expert_down=Factor(normal(5, 2, RANK, INPUTS).bfloat16()),
        expert_channels=EXPERT_CHANNELS[:2] if channels else None,
    )
    linear = QuantizedLinear(
        **base,
        expert_up=Factor(normal(6, 2, OUTPUTS, RANK).bfloat16()),
        expert_columns=normal(7, 2, OUTPUTS, 3).bfloat16() if channels else None,
    )
    assert route(part, None, modality).tolist() == [m - 1 for m in modality.tolist()]
    assert_follows_the_formula(linear, part, x, bits, modality)


def test_whoever_forgets_the_modality_makes_our_own_mistake(normal: Normal, x: Tensor) -> None:
    with pytest.raises(AssertionError, match="modality"):
        route(GroupInput(expert_down=Factor(normal(5, 1, RANK, INPUTS))), x)
    with pytest.raises(AssertionError, match="modality"):
        prepare(GroupInput(input_scale=torch.ones(2, INPUTS)), x, None, Scheme(4))


def test_a_router_may_read_another_tensor(normal: Normal, x: Tensor, modality: Tensor, base: dict[str, Tensor]) -> None:
    """Row-parallel groups route on the replicated input of their sublayer."""
    part = GroupInput(
        expert_down=Factor(normal(5, EXPERTS, RANK, INPUTS).bfloat16()), router=normal(6, EXPERTS, 12).bfloat16()
    )
    linear = QuantizedLinear(**base, expert_up=Factor(normal(7, EXPERTS, OUTPUTS, RANK).bfloat16()))
    expert = route(part, normal(8, TOKENS, 12))
    y = linear_forward(linear, prepare(part, x, expert, Scheme(4)))
    wanted = torch.stack([token_output(linear, part, t, e, 0, None) for t, e in zip(x, expert.tolist(), strict=True)])
    assert (y.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_router_without_its_input_is_our_own_mistake(router: Tensor) -> None:
    with pytest.raises(AssertionError, match="router's input"):
        route(GroupInput(router=router), None)


def test_extracted_outliers_leave_the_activation_grid(x: Tensor) -> None:
    """The grid of a token reaches its largest channel, so the others gain when that one is gone."""
    plain = prepare(GroupInput(), x, None, Scheme(4, 4)).base
    without = prepare(GroupInput(shared_channels=torch.tensor([5, 9], dtype=torch.int32)), x, None, Scheme(4, 4)).base
    others = [c for c in range(INPUTS) if c not in (5, 9)]
    assert not without[:, [5, 9]].any()
    assert (without - x)[:, others].abs().mean() < 0.2 * (plain - x)[:, others].abs().mean()


def test_salient_channels_stay_in_the_activation_grid(x: Tensor) -> None:
    """What they gain is a second term of their weights, which meets x as it was rounded for the codes."""
    ready = prepare(GroupInput(salient_channels=SALIENT_CHANNELS), x, None, Scheme(4, 4))
    assert torch.equal(ready.base, prepare(GroupInput(), x, None, Scheme(4, 4)).base)
    assert torch.equal(ready.salient, ready.base[:, SALIENT_CHANNELS.long()])
    assert not torch.equal(ready.salient, x[:, SALIENT_CHANNELS.long()])


def test_tokens_do_not_see_each_other(
    normal: Normal, x: Tensor, modality: Tensor, router: Tensor, base: dict[str, Tensor]
) -> None:
    part = GroupInput(expert_channels=EXPERT_CHANNELS, router=router)
    linear = QuantizedLinear(**base, expert_columns=normal(5, EXPERTS, OUTPUTS, 3))
    together = linear_forward(linear, prepare(part, x, route(part, x), Scheme(4, 6)))
    alone = torch.cat([linear_forward(linear, prepare(part, t[None], route(part, t[None]), Scheme(4, 6))) for t in x])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5)  # float32 products of other shapes


def test_a_bf16_input_is_computed_in_float32(x: Tensor, base: dict[str, Tensor]) -> None:
    linear, half = QuantizedLinear(**base), x.bfloat16()
    y = linear_forward(linear, prepare(GroupInput(), half, None, Scheme(4, 8)))
    assert torch.equal(y, linear_forward(linear, prepare(GroupInput(), half.float(), None, Scheme(4, 8))))


def test_prepare_does_not_change_its_input(x: Tensor) -> None:
    before = x.clone()
    part = GroupInput(shared_channels=SHARED_CHANNELS, input_scale=torch.full((1, INPUTS), 2.0))
    prepare(part, x, None, Scheme(4, 4))
    assert torch.equal(x, before)
