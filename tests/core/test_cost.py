"""What a group costs, against a count that knows nothing of the container's classes but the names on disk."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qe_dist.core.cost import Cost, cost_of
from qe_dist.core.quantized import Factor, GroupInput, QuantizedGroup, QuantizedLinear, input_tensors
from qe_dist.core.scheme import Scheme
from qe_dist.io.checkpoint import linear_tensors
from qe_dist.numerics.factors import store_factor
from qe_dist.numerics.hadamard import online_factors

PARTS = ("scale", "shared", "shared_channels", "experts", "expert_channels", "router", "salient", "rotation")


def drawn_factor(bits: int, *shape: int) -> Factor:
    return store_factor(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))), bits)


def group_of(
    parts: set[str],
    *,
    bits: int = 4,
    factor_bits: int = 16,
    inputs: int = 40,
    outputs: tuple[int, ...] = (6, 10),
    rank: int = 2,
    experts: int = 3,
    modalities: int = 1,
    group_size: int | None = None,
) -> QuantizedGroup:
    """A group that holds these parts."""

    def factor(part: str, *shape: int) -> Factor | None:
        return drawn_factor(factor_bits, *shape) if part in parts else None

    def plain(part: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor | None:
        return torch.zeros(shape, dtype=dtype) if part in parts else None

    def linear(out: int) -> QuantizedLinear:
        return QuantizedLinear(
            codes=torch.zeros(out, inputs, dtype=torch.int8),
            scale=torch.ones(out, inputs // (group_size or inputs), dtype=torch.bfloat16),
            bias=torch.zeros(out),
            shared_up=factor("shared", out, rank),
            shared_columns=plain("shared_channels", out, 3),
            expert_up=factor("experts", experts, out, rank),
            expert_columns=plain("expert_channels", experts, out, 5),
            salient_columns=factor("salient", out, 4),
        )

    own = GroupInput(
        input_scale=plain("scale", modalities, inputs),
        shared_down=factor("shared", rank, inputs),
        shared_channels=plain("shared_channels", 3, dtype=torch.int32),
        expert_down=factor("experts", experts, rank, inputs),
        expert_channels=plain("expert_channels", experts, 5, dtype=torch.int32),
        router=plain("router", experts, inputs),
        salient_channels=plain("salient", 4, dtype=torch.int32),
        rotation=online_factors(inputs) if "rotation" in parts else (),
    )
    return QuantizedGroup(Scheme(bits, None, group_size), own, {f"linear{i}": linear(o) for i, o in enumerate(outputs)})


def with_activations(group: QuantizedGroup, act_bits: int | None, dynamic_outliers: int | None) -> QuantizedGroup:
    return replace(group, scheme=replace(group.scheme, act_bits=act_bits, dynamic_outliers=dynamic_outliers))


def on_disk(group: QuantizedGroup) -> list[tuple[str, Tensor]]:
    """(name, tensor) of everything that the checkpoint holds of the group, but the bias, which the model had before,
    and the shape of the codes."""
    tensors = list(input_tensors(group.input).items())
    for linear in group.linears.values():
        tensors += linear_tensors(linear, group.scheme.weight_bits).items()
    return [(n, t) for n, t in tensors if n not in ("bias", "weight_shape")]


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def counted(group: QuantizedGroup) -> Cost:
    """By the names on disk: of what is there once per expert, a token uses one."""
    tensors = on_disk(group)
    active = sum(size(t[0] if n.startswith("lr_expert") else t) for n, t in tensors)
    codes = sum(x.codes.numel() for x in group.linears.values())
    macs = {"a16": repairs(group), "int8": 0}
    macs["a16" if group.scheme.act_bits is None or group.scheme.dynamic_outliers else "int8"] += codes
    return Cost(sum(size(t) for _, t in tensors), active, macs)


def inputs_of(group: QuantizedGroup) -> int:
    return next(iter(group.linears.values())).codes.shape[1]


def repairs(group: QuantizedGroup) -> int:
    """Rows times columns of every matrix beside the codes that one token meets."""
    part, total = group.input, 0
    if part.shared_down is not None:
        rank, inputs = part.shared_down.dense.shape
        total += rank * inputs
    if part.expert_down is not None:
        _, rank, inputs = part.expert_down.dense.shape
        total += rank * inputs
    total += inputs_of(group) * sum(len(factor) for factor in part.rotation)
    if part.router is not None:  # the distance to every expert
        total += part.router.numel()
    for linear in group.linears.values():
        outputs, width = linear.codes.shape[0], 0
        width += 0 if linear.shared_up is None else linear.shared_up.dense.shape[1]
        width += 0 if linear.shared_columns is None else linear.shared_columns.shape[1]
        width += 0 if linear.expert_up is None else linear.expert_up.dense.shape[2]
        width += 0 if linear.expert_columns is None else linear.expert_columns.shape[2]
        width += 0 if linear.salient_columns is None else linear.salient_columns.dense.shape[1]
        total += outputs * width
    return total


@given(
    parts=st.sets(st.sampled_from(PARTS)),
    bits=st.integers(2, 8),
    factor_bits=st.sampled_from([4, 8, 16]),
    inputs=st.integers(1, 9).map(lambda n: 8 * n),
    outputs=st.lists(st.integers(1, 6).map(lambda n: 2 * n), min_size=1, max_size=3).map(tuple),
    rank=st.integers(1, 3).map(lambda n: 2 * n),
    experts=st.integers(1, 4),
    modalities=st.integers(1, 2),
    group_size=st.sampled_from([None, 8]),
    activations=st.sampled_from([(None, None), (8, None), (4, 3)]),
)
def test_every_part_is_counted(
    parts: set[str], activations: tuple[int | None, int | None], **sizes: int | tuple[int, ...] | None
) -> None:
    group = with_activations(group_of(parts, **sizes), *activations)
    assert cost_of(group) == counted(group)
    assert cost_of(group).active <= cost_of(group).stored


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
@pytest.mark.parametrize("parts", [*itertools.combinations(PARTS, 2), PARTS], ids="-".join)
def test_stored_are_the_bytes_that_the_checkpoint_has(parts: tuple[str, ...], factor_bits: int) -> None:
    """Whatever the tensors are called."""
    group = group_of(set(parts), factor_bits=factor_bits)
    bare = {n: replace(x, bias=None) for n, x in group.linears.items()}
    written = [input_tensors(group.input), *(linear_tensors(x, group.scheme.weight_bits) for x in bare.values())]
    sizes = [size(t) for tensors in written for name, t in tensors.items() if name != "weight_shape"]
    assert cost_of(group).stored == sum(sizes)


def test_by_hand() -> None:
    """Inputs 40, outputs 6 + 10, 3 bits (4 words a row), rank 2, 3 experts, activations of 6 bits, factors of a
    rotation of order 20 and 2."""
    group = with_activations(group_of(set(PARTS), bits=3), 6, None)
    codes, scales = 16 * 4 * 4, 16 * 2
    shared, columns, salient = 2 * (2 * 40 + 16 * 2), 4 * 3 + 2 * 16 * 3, 4 * 4 + 2 * 16 * 4
    expert, own_columns, router = 2 * (2 * 40 + 16 * 2), 4 * 5 + 2 * 16 * 5, 2 * 3 * 40
    fixed = codes + scales + 2 * 40 + shared + columns + salient + router + 20 * 20 + 2 * 2
    assert cost_of(group) == Cost(
        stored=fixed + 3 * (expert + own_columns),
        active=fixed + expert + own_columns,
        macs={"int8": 16 * 40, "a16": 2 * (2 * 40 + 16 * 2) + 16 * (3 + 5 + 4) + 3 * 40 + 40 * (20 + 2)},
    )


def test_dynamic_outlier_channels_cost_the_integer_product_and_not_a_byte() -> None:
    rounded, with_outliers = (with_activations(group_of(set(PARTS)), 6, k) for k in (None, 16))
    before, after = cost_of(rounded), cost_of(with_outliers)
    assert (after.stored, after.active) == (before.stored, before.active)
    assert before.macs["int8"] == 16 * 40
    assert after.macs == {"a16": sum(before.macs.values()), "int8": 0}
