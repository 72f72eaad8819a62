"""What the gate leaves to the nightly run."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def in_gate(gate: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases of a parametrized test, of which those outside `gate` are marked nightly.

    ValueError if a member of `gate` is no case: a renamed recipe must not leave the gate unseen.
    """
    cases = list(cases)
    if absent := [case for case in gate if case not in cases]:
        raise ValueError(f"{absent} are no cases")
    values = {id(case): case if isinstance(case, tuple) else (case,) for case in cases}
    return [case if case in gate else pytest.param(*values[id(case)], marks=pytest.mark.nightly) for case in cases]
