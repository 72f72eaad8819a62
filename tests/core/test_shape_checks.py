"""Under pytest a wrong shape or type is an error where it appears; else the annotations would be mere comments."""

import pytest
import torch
from jaxtyping import TypeCheckError

from qe_dist.core.batch import Batch
from qe_dist.methods.base import Codes
from qe_dist.numerics.routing import choose_experts


def test_core_is_checked() -> None:
    modality = torch.zeros(2, 4, dtype=torch.int8)  # hidden has 3 positions
    with pytest.raises(TypeCheckError):
        Batch(0, torch.zeros(2, 3, 8), modality, torch.arange(2))


def test_numerics_is_checked() -> None:
    with pytest.raises(TypeCheckError):
        choose_experts(torch.zeros(5, 8), torch.zeros(2, 9))


def test_methods_is_checked() -> None:
    with pytest.raises(TypeCheckError):
        Codes(torch.zeros(4, 8, dtype=torch.int32), torch.ones(4, 1))  # codes are int8
