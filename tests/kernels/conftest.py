import importlib.metadata
import importlib.util

import pytest


def pytest_pycollect_makemodule() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed; it exists for Linux only", allow_module_level=True)


@pytest.fixture(scope="session", autouse=True)
def old_interpreter_reads_new_arrays() -> None:
    """Triton 3.6 takes loop bounds by int() of an array of one element, which NumPy 2.4 refuses."""
    if not importlib.metadata.version("triton").startswith("3.6"):
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index_too(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_index_too
