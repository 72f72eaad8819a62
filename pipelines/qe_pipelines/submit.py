"""`qe-dist submit`: runs any other command as a job of a Ray cluster."""

import logging
from typing import Annotated

import typer

from qe_dist.core.errors import ConfigError


def submit(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(help="dashboard of the cluster, http://HOST:8265; default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS"),
    ] = None,
    attach: Annotated[str | None, typer.Option(metavar="JOB", help="follow this job instead of a new one")] = None,
) -> None:
    """Run a command on a Ray cluster: `qe-dist submit [--address URL] quantize ...`

    What follows `submit` and its own options is the command, as it is typed without `submit`. It runs on the head node,
    so its paths are those of the cluster: absolute, and on a file system that all nodes share. qe_dist travels with the
    job; everything else must be installed there. The exit code is that of the command. Ctrl-C leaves the job running;
    `ray job stop JOB` stops it.
    """
    if bool(attach) == bool(context.args):
        raise ConfigError("submit needs either a command (qe-dist submit quantize ...) or --attach JOB")
    from qe_cluster.submit import connect, follow
    from qe_cluster.submit import submit as start

    logging.disable(logging.INFO)  # log lines of Ray
    client = connect(address)
    job = attach or start(client, context.args)
    again = f"qe-dist submit --attach {job}"
    if not attach:
        typer.echo(f"job {job}; to follow it from elsewhere: {again}", err=True)
    try:
        raise typer.Exit(follow(client, job, lambda text: typer.echo(text, nl=False)))
    except KeyboardInterrupt:
        typer.echo(f"\njob {job} goes on; to follow it again: {again}; to stop it: ray job stop {job}", err=True)
        raise typer.Exit(130) from None
