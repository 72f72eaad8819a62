"""A scheme is written like `w4a6g128`, and a scheme that no grid can hold is refused."""

import pytest

from qe_dist.core.errors import ConfigError
from qe_dist.core.scheme import Scheme


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("w4a8", Scheme(4, 8)),
        ("w3a16", Scheme(3)),
        ("w3a16g128", Scheme(3, None, 128)),
        ("w2a3g8", Scheme(2, 3, 8)),
        ("w4a4k32", Scheme(4, 4, dynamic_outliers=32)),
        ("w4a4k8g64", Scheme(4, 4, 64, 8)),
    ],
)
def test_parses(text: str, scheme: Scheme) -> None:
    assert Scheme.parse(text) == scheme


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 8, 128])
@pytest.mark.parametrize("outliers", [None, 1, 32])
def test_text_and_scheme_are_inverse(weight_bits: int, group_size: int | None, outliers: int | None) -> None:
    for act_bits in range(3, 9):
        scheme = Scheme(weight_bits, act_bits, group_size, outliers)
        assert Scheme.parse(str(scheme)) == scheme
    if outliers is None:
        scheme = Scheme(weight_bits, None, group_size)
        assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "arithmetic"),
    [("w4a8", "int8"), ("w8a3g64", "int8"), ("w4a16", "a16"), ("w3a16g128", "a16"), ("w4a8k1", "a16")],
)
def test_only_tokens_that_are_integers_alone_are_multiplied_as_such(text: str, arithmetic: str) -> None:
    assert Scheme.parse(text).arithmetic == arithmetic


@pytest.mark.parametrize("text", ["", "4", "w4", "a8", "W4A8", "w4a8g", "w4a8g128x", " w4a8", "w-4a8", "w4.5a8"])
def test_refuses_what_is_not_of_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="not of the form"):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("w1a8", "weight bits"),
        ("w9a8", "weight bits"),
        ("w4a2", "activation bits"),
        ("w4a9", "activation bits"),
        ("w4a8k0", "dynamic outlier channels"),
        ("w4a16k8", "leave out k8"),
        ("w4a8g0", "group size"),
        ("w4a8g4", "group size"),
        ("w4a8g12", "group size"),
    ],
)
def test_refuses_impossible_numbers_by_name(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Scheme.parse(text)
