"""Every input ends in a right result or in one clear line, soon, with nothing half written: a few in the gate, 2,000 at
night. `python -m tests.fuzz.figures` shows the numbers."""

import random

import pytest

from tests.fuzz.figures import draw
from tests.fuzz.kinds import Place, kinds

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
"""Of Pillow on damaged files, which may be read all the same."""
NAMES = (
    "safetensors headers and indexes", "configs", "samples", "images", "recipes", "option strings",
)  # fmt: skip
IN_GATE, AT_NIGHT = 12, 334
"""Inputs of each kind."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("fuzz"))


def test_all_kinds_are_drawn(place):
    assert tuple(kinds(place)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_few_inputs_of_each_kind(place, name):
    found = draw(kinds(place)[name], place, IN_GATE, seed=1)
    assert found.faults == {}


@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_many_inputs_of_each_kind(place, name):
    """Others every night; the seed is in the message."""
    seed = random.SystemRandom().randrange(2**31)
    found = draw(kinds(place)[name], place, AT_NIGHT, seed)
    assert found.faults == {}, f"seed {seed}"
