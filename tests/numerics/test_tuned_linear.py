"""The trainable twin computes, before, during and after training, what runs of the group that it would store."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qe_dist.core.quantized import GroupInput, QuantizedGroup, QuantizedLinear
from qe_dist.core.scheme import Scheme
from qe_dist.numerics.factors import store_factor
from qe_dist.numerics.grid import dequantize, full_range_scale, round_to_grid, weight_scale
from qe_dist.numerics.hadamard import online_factors
from qe_dist.numerics.sign_sgd import descend
from qe_dist.numerics.tuned_linear import FrozenGroup, GroupLinear, SharedInput, TunedGroup

Normal = Callable[..., Tensor]
TOKENS, INPUTS, SIZES, RANK = 48, 64, {"gate": 40, "up": 24}, 6
CHANNELS = torch.tensor([3, 40])


@dataclass(frozen=True)
class Case:
    scheme: str
    factor_bits: int | None = None
    smoothed: bool = False
    extracted: bool = False
    rotated: bool = False

    def group(self, normal: Normal) -> tuple[QuantizedGroup, dict[str, Tensor]]:
        """A group as a recipe leaves it, and the weights that it stands for."""
        scheme = Scheme.parse(self.scheme)
        weights = {name: normal(i, size, INPUTS) for i, (name, size) in enumerate(SIZES.items())}
        down = store_factor(0.3 * normal(5, RANK, INPUTS), self.factor_bits) if self.factor_bits else None
        part = GroupInput(
            input_scale=(1 + normal(6, 1, INPUTS).abs()).bfloat16() if self.smoothed else None,
            shared_down=down,
            shared_channels=CHANNELS.int() if self.extracted else None,
            rotation=online_factors(INPUTS) if self.rotated else (),
        )
        linears = {}
        for i, (name, weight) in enumerate(weights.items()):
            up = store_factor(0.3 * normal(7 + i, len(weight), RANK), self.factor_bits) if self.factor_bits else None
            rounded = weight.index_fill(1, CHANNELS, 0.0) if self.extracted else weight
            scale = full_range_scale(rounded, scheme.weight_bits, scheme.group_size)
            codes = round_to_grid(rounded, scale, scheme.weight_bits)
            columns = weight[:, CHANNELS]
            if up is not None and down is not None:
                columns = columns - up.dense @ down.dense[:, CHANNELS]
            linears[name] = QuantizedLinear(
                codes, scale, shared_up=up, shared_columns=columns.bfloat16() if self.extracted else None
            )
        return QuantizedGroup(scheme, part, linears), weights


CASES = {
    "rounded": Case("w4a16g16"),
    "by output": Case("w3a16"),
    "int8": Case("w4a8g16", smoothed=True),
    "outlier channels": Case("w4a6k2g16"),
    "4-bit factors": Case("w4a16g16", factor_bits=4),
    "int8 factors, int8": Case("w4a8g16", factor_bits=8),
    "bf16 factors, extracted": Case("w4a8g16", factor_bits=16, extracted=True),
    "everything": Case("w4a8g16", factor_bits=4, smoothed=True, extracted=True, rotated=True),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


def outputs(group, x: Tensor) -> list[Tensor]:
    read = group.prepare(x)
    return [group.linear(name, read) for name in SIZES]


def without_rounding(twin: TunedGroup, x: Tensor) -> list[Tensor]:
    """What the linears would compute if their weights were not rounded."""
    base = twin.prepare(x).base.detach()
    return [
        y.detach() + base @ (twin.linears[name].weight - twin.linears[name].dequantized().detach()).T
        for name, y in zip(SIZES, outputs(twin, x), strict=True)
    ]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def test_the_twin_is_the_runtime_linear_bit_for_bit_before_and_after_training(normal, same, case):
    start, weights = case.group(normal)
    x = normal(20, TOKENS, 6) @ normal(21, 6, INPUTS)  # channels that go together: rounding to nearest is far from best
    twin = TunedGroup(start, weights, case.factor_bits or 16)
    assert same(twin.quantized(), start)
    assert equal(outputs(twin, x), outputs(FrozenGroup(start), x))
    target = without_rounding(twin, x)

    def loss(step: int = 0) -> Tensor:
        return sum((y - t).square().mean() for y, t in zip(outputs(twin, x), target, strict=True))

    descent, _ = descend(list(twin.learned(1.0, 4.0)), loss, lambda: float(loss().detach()), 24, 1 / 24, checks=12)
    assert descent.step > 0
    end = twin.quantized()
    assert not same(end.linears, start.linears)
    assert equal(outputs(twin, x), outputs(FrozenGroup(end), x))
    assert float(loss().detach()) == pytest.approx(descent.after)


@pytest.mark.parametrize("bits", [2, 4])
def test_training_starts_at_any_codes_and_may_move_each_by_one(normal, bits):
    """Those of GPTQ are not the nearest ones, and their cells are left as easily as RTN's."""
    weight = normal(0, 16, 32)
    scale, lowest = weight_scale(weight, bits, 8), -(2 ** (bits - 1))
    moved = torch.randint(-1, 2, weight.shape, generator=torch.Generator().manual_seed(1))
    codes = (round_to_grid(weight, scale, bits) + moved).clamp(lowest, -lowest - 1).to(torch.int8)
    group = QuantizedGroup(Scheme(bits, None, 8), GroupInput(), {"w": QuantizedLinear(codes, scale)})
    twin = TunedGroup(group, {"w": weight}, 16)
    assert torch.equal(twin.linears["w"].codes()[0], codes)
    assert torch.equal(twin.linears["w"].dequantized(), dequantize(codes, scale))
    for offset in (0.5, -0.5):
        with torch.no_grad():
            twin.linears["w"].offset.fill_(offset)
        found = twin.linears["w"].codes()[0].int() - codes.int()
        assert ((found * offset >= 0) & (found.abs() <= 1)).all()
        assert found.abs().float().mean() > 0.3


def test_gradients_are_those_of_straight_through_rounding(normal):
    """Against autograd on the same formula, in which rounding is `u + (round(u) - u).detach()`."""
    start, weights = Case("w3a16g16").group(normal)
    linear, into = TunedGroup(start, weights, 16).linears["up"], normal(9, SIZES["up"], INPUTS)
    with torch.no_grad():
        linear.offset.copy_(0.3 * normal(10, *linear.offset.shape))
        linear.clip.copy_(1 - 0.2 * torch.rand(linear.clip.shape, generator=torch.Generator().manual_seed(0)))
    found = torch.autograd.grad((linear.dequantized() * into).sum(), [linear.offset, linear.clip])

    offset, clip = (t.detach().clone().requires_grad_() for t in (linear.offset, linear.clip))
    scale = linear.scale * clip
    scale = (scale + (scale.bfloat16().float() - scale).detach())[..., None]
    position = linear.weight.unflatten(1, (-1, 16)) / scale + offset.unflatten(1, (-1, 16))
    codes = (position + (position.round() - position).detach()).clamp(-4, 3)
    ((codes * scale).flatten(1) * into).sum().backward()
    assert torch.allclose(found[0], offset.grad, atol=1e-6)
    assert torch.allclose(found[1], clip.grad, atol=1e-4)
    assert (found[0] == 0).any(), "no code is at the end of the grid"


def test_a_group_prepares_its_input_once_for_all_linears(normal):
    start, _ = CASES["everything"].group(normal)
    group, calls = FrozenGroup(start), []
    prepare = group.prepare
    group.prepare = lambda x: calls.append(x) or prepare(x)
    shared = SharedInput(group, len(SIZES))
    bias = normal(3, SIZES["up"])
    gate, up = GroupLinear("gate", None, shared), GroupLinear("up", bias, shared)
    for seed in (0, 1):
        x = normal(seed, 2, 5, INPUTS)
        expected = outputs(FrozenGroup(start), x.flatten(0, 1))
        assert torch.equal(gate(x).flatten(0, 1), expected[0])
        assert torch.equal(up(x).flatten(0, 1), expected[1] + bias)
    assert len(calls) == 2
    assert shared.seen is None, "an input was kept that nobody will read"
