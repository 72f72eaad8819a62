"""Errors cross the boundary of a Ray worker, where they are pickled."""

import pickle

import pytest

from qe_dist.core.errors import CheckpointError, ConfigError, NumericalError, QEError


@pytest.mark.parametrize("kind", [QEError, ConfigError, CheckpointError, NumericalError])
def test_an_error_survives_pickling(kind: type[QEError]) -> None:
    back = pickle.loads(pickle.dumps(kind("budget.rank must be at least 1, found 0")))
    assert type(back) is kind
    assert str(back) == "budget.rank must be at least 1, found 0"


@pytest.mark.parametrize("kind", [ConfigError, CheckpointError, NumericalError])
def test_the_command_line_catches_them_all(kind: type[QEError]) -> None:
    assert issubclass(kind, QEError)


def test_a_wrong_value_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)
