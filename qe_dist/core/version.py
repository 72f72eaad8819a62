"""The version of this package. pyproject.toml reads it from here."""

VERSION = "0.2.0"
FIRST = "0.1"
"""The version whose files do not say which version wrote them."""
