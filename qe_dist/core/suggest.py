"""Names that a person may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def suggestion(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` for a name that is close to a known one; empty where none is."""
    found = get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return f", did you mean {found[0]!r}?" if found else ""
