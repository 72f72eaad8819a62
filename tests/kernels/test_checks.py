"""What the ops refuse, each by name, and that what they take passes."""

from dataclasses import replace

import pytest
import torch
from qe_kernels import Branch, Order, Weight, checks, ops, pack_up, pack_weight

M, K, N, R, E, D = 6, 256, 70, 8, 3, 4
CPU = torch.device("cpu")


def half(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def make_weight(bits: int = 4, group_size: int | None = 128, int8: bool = False) -> Weight:
    groups = 1 if group_size is None else K // group_size
    words = torch.zeros(N, K * bits // 32, dtype=torch.int32)
    return pack_weight(words, bits, half(N, groups), K, Order.NATURAL, int8, group_size)


EXPERT = torch.zeros(M, dtype=torch.int32)
CHANNELS = torch.arange(D)
EXPERT_CHANNELS = torch.arange(E * D).view(E, D)

QUANTIZE = {"x": half(M, K), "bits": 8, "int8": False}
DOWN = {
    "x": half(M, K),
    "shared": (torch.ones(R, K // 2, dtype=torch.uint8), half(R)),
    "experts": (torch.ones(E, R, K // 2, dtype=torch.uint8), half(E, R)),
    "router": torch.ones(2, E, K),
    "router_x": half(M, K),
}
LINEAR = {
    "base": half(M, K),
    "token_scale": torch.ones(M),
    "weight": make_weight(),
    "branches": [
        Branch(half(M, 32), pack_up((torch.ones(N, R, dtype=torch.int8), half(N)), Order.NATURAL)),
        Branch(half(M, E, 32), pack_up((half(E, N, R), None), Order.NATURAL), E),
        Branch(half(M, 32), pack_up((half(E, N, D), None), Order.NATURAL), E),
    ],
    "expert": EXPERT,
    "bias": half(N),
}


def int8_linear() -> dict:
    return LINEAR | {
        "base": torch.ones(M, K, dtype=torch.int8), "weight": make_weight(int8=True), "out_dtype": torch.bfloat16,
    }  # fmt: skip


def test_what_fits_is_taken() -> None:
    assert ops.quantize(**QUANTIZE).base.shape == (M, K)
    assert ops.down(**DOWN).expert_z.shape == (M, E, R)
    assert ops.linear(**LINEAR).shape == (M, N)
    assert ops.linear(**int8_linear()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.ones(M, K)}, r"x: expected contiguous bfloat16 or float16 .* found float32 \[6, 256\]"),
        ({"x": half(M, K, 1)}, r"x: expected .* \[any, any\]"),
        ({"x": half(K, M).T}, "x: expected contiguous .* found strided bfloat16"),
        ({"x": half(M, 0)}, "x: expected 1 to 32768 channels, found 0"),
        ({"x": half(1, checks.MAX_WIDTH + 1)}, "x: expected 1 to 32768 channels, found 32769"),
        ({"x": half(M, 7), "gated": True}, "x: expected gate and up side by side"),
        ({"bits": 1}, "bits: expected 2 to 8, or None for no grid, found 1"),
        ({"bits": 9}, "bits: expected 2 to 8"),
        ({"bits": None, "int8": True}, "bits: expected a grid"),
        ({"bits": None, "outliers": 4}, "bits: expected a grid"),
        ({"outliers": K}, "outliers: expected 0 to 255"),
        ({"outliers": -1}, "outliers: expected 0 to 255"),
        ({"outliers": 4, "int8": True}, "outliers: expected 0 with int8 codes"),
        ({"norm_weight": half(K + 1)}, r"norm_weight: expected .* \[256\]"),
        ({"input_scale": half(K)}, r"input_scale: expected .* \[any, 256\]"),
        ({"input_scale": half(2, K)}, "modality: expected one for each token, for 2 input scales, found None"),
        ({"input_scale": half(2, K), "modality": torch.zeros(M)}, "modality: expected contiguous int8"),
        ({"salient_channels": half(4)}, "salient_channels: expected contiguous int32 or int64"),
        ({"shared_channels": CHANNELS}, "extracted: expected extracted_columns"),
        ({"extracted": torch.zeros(1, K, dtype=torch.uint8)}, "extracted: expected .* None without such"),
        ({"shared_channels": CHANNELS, "extracted": torch.zeros(2, K, dtype=torch.uint8)}, r"extracted: .* \[1, 256\]"),
        ({"expert_channels": EXPERT_CHANNELS}, "expert: expected one for each token, for expert_channels, found None"),
        (
            {"expert_channels": EXPERT_CHANNELS, "expert": EXPERT.long()},
            r"expert: expected contiguous int32 \[6\]",
        ),
    ],
)  # fmt: skip
def test_quantize_refuses(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ops.quantize(**QUANTIZE | change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": half(M, K).float()}, "x: expected contiguous bfloat16 or float16"),
        ({"shared": (half(R, K + 2), None)}, r"shared: expected .* \[any, 256\]"),
        ({"shared": (half(R, K), half(R))}, "shared.scale: expected none for bfloat16 values"),
        ({"shared": (torch.ones(R, K, dtype=torch.int8), None)}, "shared.scale: expected one for each row"),
        ({"shared": (torch.ones(R, K, dtype=torch.int8), half(R + 1))}, r"shared.scale: expected .* \[8\]"),
        ({"shared": (torch.ones(R, K, dtype=torch.uint8), half(R))}, r"shared: expected .* \[any, 128\]"),
        ({"experts": (half(E, K), None)}, r"experts: expected .* \[any, any, 256\]"),
        ({"experts": (half(33, R, K), None)}, "experts: expected at most 32 experts, found 33"),
        ({"experts": (half(E, R, K), None)}, "experts: expected uint8 like shared, found bfloat16"),
        ({"router": torch.ones(E, K)}, r"router: expected .* \[any, any, any\]"),
        ({"router": torch.ones(1, 33, K)}, "router: expected at most 32 experts"),
        ({"router_x": None}, "router_x: expected the tensor that the routers read, found None"),
        ({"router_x": half(M + 1, K)}, r"router_x: expected .* \[6, 256\]"),
        ({"expert": EXPERT[:2]}, r"expert: expected contiguous int32 \[6\]"),
    ],
)
def test_down_refuses(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ops.down(**DOWN | change)


@pytest.mark.parametrize(
    ("x", "factors", "said"),
    [
        (half(M, K), [], "factors: expected at least one, found none"),
        (half(M, K), [torch.ones(4, 2)], r"factors\[0\]: expected contiguous float32 \[4, 4\]"),
        (half(M, K), [torch.ones(4, 4), half(2, 2)], r"factors\[1\]: expected contiguous float32 .* found bfloat16"),
        (half(M, K), [torch.ones(12, 12)], "x: expected a multiple of the 12 channels that the factors mix, found 256"),
        (torch.ones(M, K).int(), [torch.ones(4, 4)], "x: expected contiguous bfloat16 or float16 or float32"),
    ],
)
def test_rotate_refuses(x: torch.Tensor, factors: list[torch.Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ops.rotate(x, factors)


def changed_weight(**change: object) -> dict:
    return {"weight": replace(LINEAR["weight"], **change)}


PLANE = LINEAR["weight"].planes[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": half(M, K - 1)}, r"base: expected .* \[any, 256\]"),
        ({"base": torch.ones(M, K, dtype=torch.int8)}, "base: expected contiguous bfloat16 or float16 .* found int8"),
        ({"out_dtype": torch.float16}, "base: expected float16 like the output, found bfloat16"),
        ({"out_dtype": torch.float32}, "out_dtype: expected bfloat16 or float16, found float32"),
        ({"token_scale": torch.ones(M + 1)}, r"token_scale: expected contiguous float32 \[6\]"),
        (changed_weight(planes=()), "weight.planes: expected 1 for 4 bits, found 0"),
        (changed_weight(planes=(PLANE[:1],)), r"weight.planes\[0\]: expected contiguous uint8 \[2, 2, 64, 64\]"),
        (changed_weight(planes=(PLANE.view(torch.int8),)), r"weight.planes\[0\]: expected contiguous uint8"),
        (changed_weight(rows=N + 64), r"weight.planes\[0\]: expected contiguous uint8 \[3"),
        (changed_weight(scale=half(N, 2)), r"weight.scale: expected .* \[2, 70\]"),
        (changed_weight(group_size=64), r"weight.scale: expected .* \[4, 70\]"),
        ({"branches": [Branch(half(M, 32), half(N + 1, 128))]}, r"branches\[0\].up: expected .* \[70, 128\]"),
        ({"branches": [Branch(half(M, 32), half(N, 32))]}, r"branches\[0\].up: expected .* \[70, 128\]"),
        ({"branches": [Branch(half(M, 40), half(N, 128))]}, r"branches\[0\].z: expected a rank of 32, 64 .* found 40"),
        ({"branches": [Branch(half(M + 1, 32), half(N, 128))]}, r"branches\[0\].z: expected .* \[6, 32\]"),
        ({"branches": [Branch(half(M, 32).half(), half(N, 128))]}, r"branches\[0\].z: expected contiguous bfloat16"),
        ({"branches": [Branch(half(M, 32), make_weight())]}, r"branches\[0\].up.planes\[0\]: .* \[2, 1, 64, 64\]"),
        ({"branches": [Branch(half(M, E + 1, 32), half(N, 128), E)]}, r"branches\[0\].z: expected .* \[6, 3, 32\]"),
        ({"branches": [Branch(half(M, 32), half(N, 33 * 32), 33)]}, "at most 32, found 33"),
        ({"expert": None}, r"expert: expected one for each token, for branches\[1\] of experts, found None"),
        ({"expert": EXPERT.long()}, r"expert: expected contiguous int32 \[6\]"),
        ({"bias": half(N + 1)}, r"bias: expected .* \[70\]"),
    ],
)  # fmt: skip
def test_linear_refuses(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ops.linear(**LINEAR | change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": half(M, K)}, "base: expected contiguous int8"),
        ({"token_scale": None}, "token_scale: expected one for each token, for int8 codes, found None"),
    ],
)
def test_an_int8_linear_refuses(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ops.linear(**int8_linear() | change)


def test_another_device_is_named() -> None:
    with pytest.raises(ValueError, match=r"bias: expected .* on cpu, found bfloat16 .* on meta"):
        ops.linear(**LINEAR | {"bias": half(N).to("meta")})


def test_a_layout_of_another_architecture_is_refused() -> None:
    arguments = {"out_dtype": torch.bfloat16, **LINEAR}
    checks.check_linear(**arguments, order=Order.NATURAL)
    with pytest.raises(ValueError, match="weight: expected the wgmma order for cpu, found one packed in the natural"):
        checks.check_linear(**arguments, order=Order.WGMMA)


@pytest.mark.parametrize(
    ("size", "bits", "order", "fits"),
    [
        (24, 4, Order.NATURAL, False),
        (96, 4, Order.WGMMA, True),
        (96, 3, Order.WGMMA, False),
        (96, 3, Order.NATURAL, True),
        (16, 2, Order.WGMMA, True),
    ],
)
def test_groups_that_no_step_fits_are_refused(size: int, bits: int, order: Order, fits: bool) -> None:
    words, scale = torch.zeros(N, 2 * size * bits // 32, dtype=torch.int32), half(N, 2)
    weight = pack_weight(words, bits, scale, 2 * size, order, False, size)
    arguments = (half(M, 2 * size), None, weight, [], None, None, torch.bfloat16)
    checks.check_linear(*arguments, order=None)
    if fits:
        checks.check_linear(*arguments, order=order)
    else:
        with pytest.raises(ValueError, match=rf"weight.group_size: .* found {size} for {bits} bits"):
            checks.check_linear(*arguments, order=order)


def test_memory_that_vectors_cannot_be_loaded_from_is_refused() -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    assert memory.data_ptr() % 16 == 0
    checks.expect_aligned({"x": memory, "y": memory[16:], "z": None})
    with pytest.raises(ValueError, match="x: expected memory aligned to 16 bytes, found an offset of 6"):
        checks.expect_aligned({"x": memory[6:]})
