"""What other engines are given of a block, seen in a block of a few tensors."""

import pytest
import torch

from qe_dist.checkpoint.compressed_tensors import ROWS, exported_block
from qe_dist.core.errors import ConfigError
from qe_dist.core.layout import BlockLayout, GroupLayout, TensorSpec
from qe_dist.core.scheme import Scheme
from qe_dist.core.spec import Feeder
from qe_dist.numerics.packing import pack

WIDTH, OUTPUTS = 64, 2 * ROWS


@pytest.fixture
def block():
    """block(codes): a norm and one linear, whose low-rank branch holds all channels alike."""

    def build(codes):
        tensors = {
            "b.norm.weight": torch.ones(WIDTH),
            "b.fc.weight_packed": pack(codes, 4),
            "b.fc.weight_scale": torch.ones(OUTPUTS, 1),
            "b.fc.weight_shape": torch.tensor(codes.shape),
            "b.fc.lr_shared_b": torch.ones(OUTPUTS, 1),
            "b.fc_input.lr_shared_a": 8 * torch.ones(1, WIDTH),
        }
        specs = {"lr_shared_a": TensorSpec("float32", (1, WIDTH))}
        layout = BlockLayout({"fc": GroupLayout(Scheme.parse("w4a16"), "fc", specs, {"fc": {}})})
        return "b.", layout, tensors, {"fc": Feeder("norm")}

    return build


def test_a_channel_with_any_code_is_not_taken_for_one_that_the_repair_holds(block):
    codes = torch.ones(OUTPUTS, WIDTH, dtype=torch.int8)
    codes[:-1, 5] = 0
    exported_block(*block(codes), peft=False)
    codes[-1, 5] = 0
    with pytest.raises(ConfigError, match=r"b\.fc: the codes have nothing of 1 of its 64 input channels"):
        exported_block(*block(codes), peft=False)
    assert set(exported_block(*block(codes), peft=True).adapters) == {"fc"}


def test_a_channel_that_nobody_uses_is_no_reason_to_refuse(block):
    codes = torch.ones(OUTPUTS, WIDTH, dtype=torch.int8)
    codes[:, 5] = 0
    prefix, layout, tensors, feeders = block(codes)
    tensors["b.fc_input.lr_shared_a"][:, 5] = 0.1
    assert "b.fc.weight_packed" in exported_block(prefix, layout, tensors, feeders, peft=False).tensors


def test_codes_that_fit_are_handed_on_unopened(block):
    prefix, layout, tensors, feeders = block(torch.ones(OUTPUTS, WIDTH, dtype=torch.int8))
    written = exported_block(prefix, layout, tensors, feeders, peft=True).tensors
    assert written["b.fc.weight_packed"] is tensors["b.fc.weight_packed"]
