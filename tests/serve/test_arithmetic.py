"""The arithmetic that a scheme names is the one that its product executes: read from what the kernels are handed."""

from collections.abc import Callable

import pytest
import torch
from qe_kernels import layout, ops, plans
from qe_kernels.dispatch import Device
from torch import Tensor

from qe_dist.core.quantized import GroupInput
from qe_dist.core.scheme import Scheme
from qe_dist.methods.recipes import METHODS, RECIPES, SCHEMES, arithmetics
from qe_dist.numerics.packing import pack
from qe_dist.serve import on_kernels

Normal = Callable[..., Tensor]
TOKENS, INPUTS, OUTPUTS = 5, 128, 48
WRITTEN = sorted(
    {str(recipe.scheme) for recipe in RECIPES.values()} | {"w2a3", "w8a8g32", "w4a6k1", "w3a8k8g64", "w8a16"}
)
GPU = Device("interpreter", (8, 0), processors=2)


def executed(normal: Normal, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one operand type of a linear that runs through the kernels, in Triton's interpreter."""
    monkeypatch.setattr(ops, "device_of", lambda device: GPU)
    monkeypatch.setattr(on_kernels, "order_for", lambda device: layout.order_for(GPU.capability))
    multiplied = []

    class Watched(plans.Linear):
        def __call__(self, base: Tensor, *others) -> Tensor:
            multiplied.append((base.dtype, self.weight.int8))
            return super().__call__(base, *others)

    monkeypatch.setattr(plans, "Linear", Watched)
    top = 2 ** (scheme.weight_bits - 1)
    codes = (top / 2 * normal(0, OUTPUTS, INPUTS)).round().clamp(-top, top - 1).to(torch.int8)
    scale = (normal(1, OUTPUTS, INPUTS // (scheme.group_size or INPUTS)).abs() / top).bfloat16()
    linear = on_kernels.Linear(pack(codes, scheme.weight_bits), scale, {}, scheme, INPUTS)
    front = on_kernels.Input(GroupInput(), scheme, INPUTS)
    linear(front.prepare(normal(2, TOKENS, INPUTS).bfloat16(), None, None), None, torch.bfloat16)
    return {(torch.int8, True): "int8", (torch.bfloat16, False): "a16"}[multiplied[0]]


@pytest.mark.parametrize("written", WRITTEN)
def test_a_scheme_names_what_the_kernel_multiplies(normal: Normal, monkeypatch, written: str) -> None:
    scheme = Scheme.parse(written)
    assert executed(normal, scheme, monkeypatch) == scheme.arithmetic


def test_what_is_listed_of_whole_recipes_is_what_they_execute(normal: Normal, monkeypatch) -> None:
    listed = {name: row for row, recipes in arithmetics().items() for name in recipes}
    assert listed.keys() == METHODS.keys()
    for method, row in listed.items():
        for scheme, arithmetic in zip(SCHEMES, row, strict=True):
            with monkeypatch.context() as patch:
                assert executed(normal, RECIPES[f"{method}-{scheme}"].scheme, patch) == arithmetic
