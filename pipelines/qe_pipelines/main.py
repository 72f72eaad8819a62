"""`qe-dist <command>`. Modules of commands import quickly; each command imports what it needs when it runs."""

import os
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from qe_dist import __version__
from qe_dist.core.errors import NO_ROOM, CheckFailed, QEError, Stopped, TemporaryError
from qe_pipelines.compare import compare
from qe_pipelines.console import EXTRA_OF
from qe_pipelines.data import data
from qe_pipelines.demo import demo
from qe_pipelines.evaluate import evaluate
from qe_pipelines.export import export
from qe_pipelines.help import told
from qe_pipelines.progress import log
from qe_pipelines.quantize import quantize
from qe_pipelines.sensitivity import sensitivity
from qe_pipelines.serve import serve
from qe_pipelines.status import status
from qe_pipelines.submit import submit
from qe_pipelines.terminal import (
    OutputError,
    flush_output,
    give_up_output,
    keep_traceback,
    lenient_output,
    say,
)
from qe_pipelines.verify import verify

ClickException: Any = typer.BadParameter.__mro__[2]
"""typer has no name for it, and some versions bring a click of their own."""
INTERRUPTED = 130

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command(**told("quantize"))(quantize)
app.command(name="eval", **told("eval"))(evaluate)
app.command(**told("compare"))(compare)
app.command(**told("data"))(data)
app.command(**told("demo"))(demo)
app.command(**told("submit"), context_settings={"allow_extra_args": True, "allow_interspersed_args": False})(submit)
app.command(**told("verify"))(verify)
app.command(context_settings={"allow_extra_args": True}, **told("serve"))(serve)
app.command(**told("status"))(status)
app.command(**told("export"))(export)
app.command(**told("sensitivity"))(sensitivity)


def _tell_version(asked: bool) -> None:
    if asked:
        others = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "ray", "vllm"))
        typer.echo(f"qe-dist {__version__} (Python {sys.version.split()[0]}, {others})")
        raise typer.Exit


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@app.callback()
def about(
    tell_version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="print the version, and stop")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="also show the traceback of an error")] = False,
) -> None:
    """Quantize vision-language models with Quant Experts, on as many GPUs or CPUs as there are.

    Exit codes: 0 done; 1 a check failed; 2 an input or option is faulty; 70 a fault of qe-dist itself; 75 type the same
    command again; 130 interrupted.
    """


def main() -> None:
    """The console script. Whatever goes wrong ends in one line, and in one of the exit codes that `about` lists; a
    traceback is shown by --debug alone, and that of a fault of our own is kept in a file."""
    words, debug = _debugged(sys.argv[1:])
    with lenient_output():
        code = _run(words, debug)
    sys.exit(code)


def _run(words: list[str], debug: bool) -> int:
    try:
        code = app(args=words, prog_name="qe-dist", standalone_mode=False)
        flush_output()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted")
        return INTERRUPTED
    except ClickException as error:
        return _usage(error)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRA_OF:
            raise  # console.py names the extra
        if debug:
            traceback.print_exc()
        return _told(error)


def _told(error: BaseException) -> int:
    """Says in one line what went wrong. Returns the exit code."""
    if isinstance(error, Stopped):
        say(str(error))
        return os.EX_TEMPFAIL
    if isinstance(error, OutputError):
        give_up_output()
    if isinstance(error, QEError):
        log.error(str(error))
        say(f"error: {error}")
        if isinstance(error, TemporaryError):
            return os.EX_TEMPFAIL
        return 1 if isinstance(error, CheckFailed) else 2
    if isinstance(error, OSError) and error.filename is not None:
        said = f"{error.filename}: {error.strerror}"
        code = os.EX_TEMPFAIL if error.errno in NO_ROOM else 2
    elif isinstance(error, MemoryError):
        said, code = "this machine has no memory left; end what else runs here", os.EX_TEMPFAIL
    else:
        first = str(error).strip().partition("\n")[0]
        said, code = f"qe-dist failed, which is no fault of the input: {type(error).__name__}: {first}", os.EX_SOFTWARE
    log.error("%s", said, exc_info=error)
    say(f"error: {said}; {keep_traceback(error)}")
    return code


def _usage(error: Exception) -> int:
    """Says in one line what of the command line is wrong. Without any argument, help is what was asked for."""
    context = getattr(error, "ctx", None)
    if context is not None and not sys.argv[1:]:
        typer.echo(context.get_help())
        return 2
    where = context.command_path if context is not None else "qe-dist"
    said = " ".join(error.format_message().split()).replace("?.", "?")  # type: ignore[attr-defined]
    stop = "" if said.endswith((".", "?")) else "."
    say(f"error: {said}{stop} See: {where} --help")
    return 2


def _debugged(words: list[str]) -> tuple[list[str], bool]:
    """The words of the command line, and whether --debug is among them, before or behind the command. What follows
    `submit` or `--` is another command's."""
    end = next((i for i, word in enumerate(words) if word in ("--", "submit")), len(words))
    return [word for i, word in enumerate(words) if i >= end or word != "--debug"], "--debug" in words[:end]


if __name__ == "__main__":
    main()
