import importlib.util

import pytest


def pytest_pycollect_makemodule() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed; it exists for Linux only", allow_module_level=True)
