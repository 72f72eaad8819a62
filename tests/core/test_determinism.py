"""The thread count is fixed once per process."""

import torch

from qe_dist.core.determinism import pin


def test_pin_sets_the_number_of_threads() -> None:
    try:
        pin(2)
        assert torch.get_num_threads() == 2
    finally:
        pin(1)
    assert torch.get_num_threads() == 1
