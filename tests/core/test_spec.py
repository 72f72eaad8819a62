"""Names and shapes of a block."""

import pytest

from qe_dist.core.spec import BlockSpec, InputGroup, LinearSpec, on_own_input, per_linear


@pytest.fixture
def block() -> BlockSpec:
    q, k = (LinearSpec(name, 64, size, True, "column") for name, size in (("attn.q", 64), ("attn.k", 32)))
    down = LinearSpec("mlp.down", 96, 64, False, "row")
    qk = InputGroup("attn.qk", (q, k), router_input="attn.qk")
    return BlockSpec(3, "model.layers.3.", (qk, InputGroup("mlp.down", (down,), "attn.qk", ("mlp.up",))), ("norm",))


def test_a_router_is_as_wide_as_the_input_it_reads(block: BlockSpec) -> None:
    down = block.group("mlp.down")
    assert down.in_features == 96
    assert block.router_width(down) == 64


def test_weights_are_counted_without_biases(block: BlockSpec) -> None:
    assert block.num_weights == 64 * 64 + 64 * 32 + 96 * 64


def test_the_tensors_of_an_input_have_a_module_of_their_own(block: BlockSpec) -> None:
    assert [group.module for group in block.groups] == ["attn.qk_input", "mlp.down_input"]


def test_per_linear_gives_every_linear_a_group_that_routes_on_its_own_input(block: BlockSpec) -> None:
    split = per_linear(block)
    assert [group.name for group in split.groups] == ["attn.q", "attn.k", "mlp.down"]
    assert all(group.router_input == group.name and len(group.linears) == 1 for group in split.groups)
    assert [group.producers for group in split.groups] == [(), (), ("mlp.up",)]
    assert split.num_weights == block.num_weights
    assert (split.index, split.prefix, split.others) == (block.index, block.prefix, block.others)


def test_on_own_input_changes_nothing_but_what_routers_read(block: BlockSpec) -> None:
    own = on_own_input(block)
    assert [own.router_width(group) for group in own.groups] == [64, 96]
    assert [(g.name, g.linears, g.producers) for g in own.groups] == [
        (g.name, g.linears, g.producers) for g in block.groups
    ]
