"""What config.json says of a checkpoint is read as it was written; another format is refused in a line."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.layout import BlockLayout, GroupLayout, Layout, TensorSpec
from qe_dist.core.scheme import Scheme

PACKED = {"weight_packed": TensorSpec("int32", (4, 1))}
PLAIN = GroupLayout(Scheme.parse("w4a8"), "qkv", {}, {"q": PACKED, "k": PACKED})
FACTORS = {"rotation_0": TensorSpec("int8", (4, 4)), "rotation_1": TensorSpec("int8", (2, 2))}
SCALES = TensorSpec("bfloat16", (2, 8))
DOWN, CHANNELS = TensorSpec("bfloat16", (3, 8)), TensorSpec("int32", (5,))
EXPERTS = {"lr_expert_a": TensorSpec("bfloat16", (2, 3, 8))}
ROUTER = {"router": TensorSpec("bfloat16", (2, 8))}


def group(**specs: TensorSpec) -> GroupLayout:
    return replace(PLAIN, input=specs)


def of(*groups: GroupLayout) -> Layout:
    return Layout(tuple(BlockLayout({"qkv": one}) for one in groups))


@pytest.mark.parametrize(("other", "version"), [(group(input_scale=SCALES), 2), (group(**FACTORS), 3)])
def test_it_is_read_as_it_was_written_and_equal_blocks_are_written_once(other: GroupLayout, version: int) -> None:
    layout = of(PLAIN, other, PLAIN)
    written = json.loads(json.dumps(layout.to_json()))
    assert list(written) == ["quant_method", "format", "version", "layouts", "block_layouts"]
    assert (written["version"], written["block_layouts"], len(written["layouts"])) == (version, [0, 1, 0], 2)
    assert written["layouts"][0]["qkv"]["linears"]["q"] == {"weight_packed": ["int32", 4, 1]}
    assert Layout.from_json(written) == layout


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            {"version": 1},
            CheckpointError,
            "version 1, which qe_dist 0.1 wrote; qe_dist .* reads 2 and 3; quantize the model",
        ),
        ({"version": None}, CheckpointError, "version None, which qe_dist 0.1 wrote"),
        ({"version": 4}, CheckpointError, "version 4, which a later qe_dist wrote; .* reads 2 and 3; install that"),
        ({"quant_method": "awq"}, ConfigError, "was quantized by awq: config.json has no quantization_config of qe"),
        ({"quant_method": None}, ConfigError, "is not quantized: config.json"),
        ({"block_layouts": [1]}, CheckpointError, "quantization_config in config.json is damaged: IndexError"),
        ({"layouts": [{"qkv": {}}]}, CheckpointError, "quantization_config in config.json is damaged: KeyError"),
    ],
)
def test_another_format_is_refused_with_what_to_do(change: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Layout.from_json(of(PLAIN).to_json() | change)
    with pytest.raises(ConfigError, match="no quantization_config of qe_dist"):
        Layout.from_json(None)


@pytest.mark.parametrize(
    ("one", "by_modality", "routed", "extracts", "rotated", "rank"),
    [
        (PLAIN, False, False, False, 1, 0),
        (group(input_scale=SCALES), True, False, False, 1, 0),
        (group(input_scale=TensorSpec("bfloat16", (1, 8))), False, False, False, 1, 0),
        (group(**EXPERTS), True, False, False, 1, 0),
        (group(**EXPERTS, **ROUTER), False, True, False, 1, 0),
        (group(lr_shared_a=DOWN, lr_shared_channels=CHANNELS), False, False, True, 1, 8),
        (group(lr_salient_channels=CHANNELS), False, False, False, 1, 5),
        (group(**FACTORS), False, False, False, 8, 0),
    ],
)
def test_shapes_tell_what_a_group_does(
    one: GroupLayout, by_modality: bool, routed: bool, extracts: bool, rotated: int, rank: int
) -> None:
    assert (one.by_modality, one.routed, one.extracts) == (by_modality, routed, extracts)
    assert (one.rotated_block, one.static_rank) == (rotated, rank)


def test_a_block_names_all_its_tensors() -> None:
    block = BlockLayout({"qkv": group(input_scale=SCALES)})
    assert block.tensors == {
        "qkv_input.input_scale": SCALES, "q.weight_packed": PACKED["weight_packed"],
        "k.weight_packed": PACKED["weight_packed"],
    }  # fmt: skip
    assert TensorSpec.of(SCALES.empty()) == SCALES
    assert SCALES.empty().dtype == torch.bfloat16
