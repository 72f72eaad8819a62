"""vLLM's command line, read as vLLM reads it."""

from collections.abc import Sequence
from typing import Any, NoReturn

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from qe_dist.core.errors import ConfigError


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"vLLM does not take these options: {message}; `vllm serve --help=all` lists what it takes")


def arguments(options: Sequence[str]) -> dict[str, Any]:
    """What differs from vLLM's defaults, by the names of its arguments. ConfigError for an unknown option."""
    parser = make_arg_parser(_Parser())
    given, default = vars(parser.parse_args([*options])), vars(parser.parse_args([]))
    return {name: value for name, value in given.items() if value != default[name]}
