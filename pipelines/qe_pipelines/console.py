"""`qe-dist` as it is installed: the commands, or one line that names the extra which is not installed."""

import sys
from importlib.util import find_spec

EXTRA_OF = {
    "accelerate": "quantize",
    "aiohttp": "quantize",
    "datasets": "quantize",
    "fastapi": "serve",
    "matplotlib": "report",
    "pydantic": "quantize",
    "ray": "quantize",
    "rich": "quantize",
    "sklearn": "quantize",
    "starlette": "serve",
    "threadpoolctl": "quantize",
    "typer": "quantize",
    "vllm": "vllm",
}
"""Module that a bare `pip install qe_dist` does not bring -> the extra that brings it (pyproject.toml)."""
TO_QUANTIZE = ("ray", "accelerate", "sklearn", "threadpoolctl")


def require(*modules: str) -> None:
    """ModuleNotFoundError, which `main` turns into one line, for the first module that is not installed.

    Called by commands whose work would otherwise end for a missing package after hours.
    """
    for module in modules:
        if find_spec(module) is None:
            raise ModuleNotFoundError(name=module)


def main() -> None:
    """Console script. Exit code 2 and one line where a package of an extra is missing."""
    try:
        from qe_pipelines import main

        main.main()
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRA_OF:
            raise
        print(f"error: {module} is not installed; pip install 'qe_dist[{EXTRA_OF[module]}]'", file=sys.stderr)
        sys.exit(2)
