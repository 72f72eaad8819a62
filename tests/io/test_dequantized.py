"""fp8 weights stand for code times scale, in each of the shapes that scales have."""

import pytest
import torch

from qe_dist.io.dequantized import dequantize, quantization


@pytest.mark.parametrize(
    ("scale", "block"),
    [((), None), ((1,), None), ((5,), None), ((5, 1), None), ((3, 4), (2, 2)), ((2, 2), (4, 4))],
)
def test_each_code_is_multiplied_by_the_scale_of_its_place(normal, scale, block):
    codes, factors = normal(0, 5, 7).to(torch.float8_e4m3fn), normal(1, *(scale or (1,))).abs().reshape(scale)
    found = dequantize(codes, factors, block)
    for row in range(5):
        for column in range(7):
            if block is not None:
                own = factors[row // block[0], column // block[1]]
            else:
                own = factors if factors.numel() == 1 else factors[row]
            assert found[row, column] == codes[row, column].float() * own.reshape(())


def test_stacked_experts_have_blocks_of_their_own(normal):
    codes, factors = normal(0, 3, 4, 4).to(torch.float8_e4m3fn), normal(1, 3, 2, 2).abs()
    found = dequantize(codes, factors, (2, 2))
    for expert in range(3):
        assert torch.equal(found[expert], dequantize(codes[expert], factors[expert], (2, 2)))


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"text_config": None}, None),
    ],
)
def test_where_a_config_says_how_its_model_is_quantized(config, method):
    said = quantization(config)
    assert (said and said["quant_method"]) == method
