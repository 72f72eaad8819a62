"""Gram matrices by panels against one product in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qe_dist.numerics import gram
from qe_dist.numerics.gram import PANEL, add_gram

Normal = Callable[..., Tensor]


@pytest.mark.parametrize("panel", [1, 5, 16, 29, 64], ids=lambda n: f"{n} of 29 channels")
def test_panels_sum_the_whole_matrix(normal: Normal, monkeypatch: pytest.MonkeyPatch, panel: int) -> None:
    monkeypatch.setattr(gram, "PANEL", panel)
    parts = [normal(seed, 40, 29) for seed in (0, 1)]
    summed = torch.zeros(29, 29)
    for x in parts:
        add_gram(summed, x)
    x = torch.cat(parts).double()
    assert torch.allclose(summed.double(), x.T @ x, atol=1e-4)


def test_the_halves_of_several_panels_are_mirror_images(normal: Normal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "PANEL", 7)
    summed = torch.zeros(29, 29)
    add_gram(summed, normal(2, 40, 29))
    for low in range(0, 29, 7):
        assert torch.equal(summed[low + 7 :, low : low + 7], summed[low : low + 7, low + 7 :].T)


def test_a_layer_of_one_panel_is_one_product_to_the_bit(normal: Normal) -> None:
    x = normal(3, 50, 96)
    summed = torch.ones(96, 96)
    add_gram(summed, x)
    assert torch.equal(summed, torch.ones(96, 96) + x.T @ x)
    assert PANEL >= 2048  # the widths of the bundled models, and their measured results, are one panel


def test_bf16_tokens_are_multiplied_exactly(normal: Normal) -> None:
    x = normal(4, 40, 29).bfloat16()
    summed = torch.zeros(29, 29)
    add_gram(summed, x)
    assert torch.allclose(summed.double(), x.double().T @ x.double(), atol=1e-4)


@pytest.mark.gpu
def test_tensor_cores_give_the_same_sums(normal: Normal) -> None:
    x = normal(5, 4096, 3000).bfloat16().cuda()
    summed = torch.zeros(3000, 3000, device="cuda")
    add_gram(summed, x)
    add_gram(summed, x)
    exact = 2 * x.double().T @ x.double()
    assert (summed.double() - exact).norm() < 1e-5 * exact.norm()
    assert torch.equal(summed, summed.T)
