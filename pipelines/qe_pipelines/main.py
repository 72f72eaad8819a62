"""`qe-dist <command>`. Modules of commands import quickly; each command imports what it needs when it runs."""

import os
import sys

import typer
from rich.console import Console
from rich.markup import escape

from qe_dist.core.errors import QEError, Stopped, TemporaryError
from qe_pipelines.compare import compare
from qe_pipelines.demo import demo
from qe_pipelines.evaluate import evaluate
from qe_pipelines.export import export
from qe_pipelines.progress import log
from qe_pipelines.quantize import quantize
from qe_pipelines.sensitivity import sensitivity
from qe_pipelines.serve import serve
from qe_pipelines.status import status
from qe_pipelines.submit import submit
from qe_pipelines.verify import verify

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(quantize)
app.command(name="eval")(evaluate)
app.command()(compare)
app.command()(demo)
app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})(submit)
app.command()(verify)
app.command(context_settings={"allow_extra_args": True})(serve)
app.command()(status)
app.command()(export)
app.command()(sensitivity)


@app.callback()
def about() -> None:
    """Quantize vision-language models with Quant Experts, on as many GPUs or CPUs as there are."""


def main() -> None:
    """The console script. An error that the user can correct ends in one paragraph and exit code 2; what the same
    command continues, as after a lost node, a full disk or a request to stop, in exit code 75 (EX_TEMPFAIL)."""
    try:
        app(standalone_mode=True)
    except Stopped as stopped:
        Console(stderr=True).print(escape(str(stopped)), highlight=False, soft_wrap=True)
        sys.exit(os.EX_TEMPFAIL)
    except QEError as error:
        log.error(str(error))
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(os.EX_TEMPFAIL if isinstance(error, TemporaryError) else 2)


if __name__ == "__main__":
    main()
