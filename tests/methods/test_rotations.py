"""Every file of methods/rotations: a choice of orthogonal matrices, and nothing else."""

import dataclasses
import pickle

import pytest
import torch

from qe_dist import archs, methods
from qe_dist.core.errors import ConfigError
from qe_dist.methods.base import Rotation
from qe_dist.methods.rotations.hadamard import Hadamard
from qe_dist.numerics.hadamard import block_size

WIDTHS = {"stream": 96, "head": 24}
GAINS = torch.rand(5, 96, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.mark.parametrize("name", methods.names("rotation"))
def test_a_rotation_is_a_frozen_dataclass_that_gives_an_orthogonal_matrix_for_every_space(name):
    kind = methods.get("rotation", name)
    rotation = kind()
    assert isinstance(rotation, Rotation)
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert pickle.loads(pickle.dumps(rotation)) == rotation
    bases, again = (rotation.bases(WIDTHS, GAINS) for _ in range(2))
    assert bases.keys() == WIDTHS.keys()
    for space, width in WIDTHS.items():
        eye = torch.eye(width, dtype=torch.float64)
        matrix = bases[space](eye)
        assert torch.allclose(matrix @ matrix.T, eye, atol=1e-12)
        assert torch.equal(matrix, again[space](eye))


def test_channels_of_unlike_gain_stay_apart_unless_all_are_to_be_mixed():
    gains = GAINS.clone()
    gains[:, [3, 70]] *= 40.0
    eye = torch.eye(96, dtype=torch.float64)
    apart, mixed = (Hadamard(octaves=o).bases(WIDTHS, gains)["stream"](eye) for o in (2.0, 0.0))
    assert (apart[3] != 0).nonzero().flatten().tolist() == [3, 70]
    assert torch.allclose(mixed.abs(), torch.full_like(mixed, 96**-0.5))


def test_at_run_time_down_alone_is_rotated():
    groups = {g.name: g for g in archs.get("qwen2_vl").groups(archs.get("qwen2_vl").tiny)}
    for name, group in groups.items():
        assert not Hadamard(online=False).at_run_time(group, ranks=1)
        assert bool(Hadamard().at_run_time(group, ranks=1)) == (name == "mlp.down")


@pytest.mark.parametrize(
    ("own", "sizes"),
    [(1, {1: 96, 2: 48, 3: 32, 4: 24, 8: 12}), (2, {1: 48, 4: 24, 5: 48}), (8, {1: 12, 2: 12, 3: 4, 8: 12, 16: 2})],
)
def test_its_blocks_are_for_as_many_ranks_as_it_says_and_for_those_of_the_run(own, sizes):
    down = next(g for g in archs.get("qwen2_vl").groups(archs.get("qwen2_vl").tiny) if g.name == "mlp.down")
    assert {ranks: block_size(Hadamard(ranks=own).at_run_time(down, ranks)) for ranks in sizes} == sizes


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seed": -1}, r"rotation\.seed"),
        ({"octaves": -1.0}, r"rotation\.octaves"),
        ({"octaves": float("inf")}, "inf"),
        ({"ranks": 0}, r"rotation\.ranks"),
    ],
)
def test_settings_that_cannot_be(settings, named):
    with pytest.raises(ConfigError, match=named):
        Hadamard(**settings)
