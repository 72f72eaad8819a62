"""`qe-dist serve`: an OpenAI-compatible endpoint for a checkpoint, on Ray or by vLLM alone."""

import json
import logging
import os
import shlex
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.serve.http.endpoint import Endpoint
from qe_pipelines.cluster import joined
from qe_pipelines.progress import set_up_logging
from qe_pipelines.quantize import stopping

KEYS = ("QE_DIST_API_KEY", "VLLM_API_KEY")


def serve(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="a finished checkpoint")],
    tensor_parallel_size: Annotated[int, typer.Option(help="ranks of a replica: one GPU each", min=1)] = 1,
    replicas: Annotated[int, typer.Option(help="that share the requests", min=1)] = 1,
    cluster: Annotated[str | None, typer.Option(help="a running Ray cluster; default: start one here")] = None,
    local: Annotated[bool, typer.Option("--local", help="plain vLLM on this machine, without Ray")] = False,
    host: Annotated[str, typer.Option(help="that the endpoint listens at; 0.0.0.0: at all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="of the endpoint", min=1, max=65535)] = 8000,
    api_key: Annotated[str | None, typer.Option(help="that requests must carry", envvar=[*KEYS])] = None,
    served_model_name: Annotated[str | None, typer.Option(help="in requests; default: the folder's name")] = None,
    max_requests: Annotated[int, typer.Option(help="of a replica, running and waiting; beyond: 503", min=1)] = 256,
    max_images: Annotated[int, typer.Option(help="of one request", min=0)] = 4,
    drain: Annotated[int, typer.Option(help="seconds that running requests have when it stops", min=0)] = 300,
) -> None:
    """Serve CHECKPOINT over HTTP until Ctrl-C or SIGTERM: `qe-dist serve CHECKPOINT [-- OPTIONS OF VLLM]`

    When told to stop, it refuses new requests, lets running ones end, and goes. A second Ctrl-C ends it at once.
    """
    set_up_logging(None)
    endpoint = Endpoint(
        str(checkpoint.resolve()),
        tensor_parallel_size,
        replicas,
        max_requests=max_requests,
        max_images=max_images,
        drain_seconds=drain,
        served_model_name=served_model_name,
        options=tuple(context.args),
    )
    check(endpoint)
    if host not in ("127.0.0.1", "localhost", "::1") and not api_key:
        typer.echo(f"warning: whoever reaches {host}:{port} may use the model; --api-key asks for a key", err=True)
    if local:
        _serve_locally(endpoint, cluster, host, port, api_key)
    else:
        _serve_on_ray(endpoint, cluster, host, port, api_key)


def check(endpoint: Endpoint) -> None:
    """Checks an endpoint before anything starts. Raises ConfigError, naming the option, or CheckpointError."""
    from qe_dist.checkpoint.serving import serving_problems
    from qe_dist.checkpoint.verify import Checkpoint, check_index, check_layout
    from qe_dist.serve.vllm_plugin import check_installed

    if endpoint.options and not endpoint.options[0].startswith("-"):
        raise ConfigError(f"unexpected {endpoint.options[0]!r}; options of vLLM come behind --, and begin with a dash")
    opened = Checkpoint.open(Path(endpoint.checkpoint))
    damage = [f"{name}: {error}" for name, error in opened.unreadable.items()]
    for fault in damage or [*check_index(opened), *check_layout(opened)]:
        raise CheckpointError(f"{opened.folder} is damaged: {fault}; qe-dist verify lists all there is")
    for problem in serving_problems(opened.config, endpoint.tensor_parallel_size):
        raise ConfigError(f"--tensor-parallel-size {endpoint.tensor_parallel_size}: {problem}")
    check_installed()


def _serve_locally(endpoint: Endpoint, cluster: str | None, host: str, port: int, api_key: str | None) -> None:
    """Replaces this process by vLLM, so that signals and the exit code are vLLM's own."""
    if cluster or endpoint.replicas != 1:
        raise ConfigError("--local is one replica on this machine; leave out --cluster and --replicas, or --local")
    _check_port(host, port)
    import torch

    _check_devices(endpoint, torch.cuda.device_count(), "this machine")
    command = ["serve", endpoint.checkpoint, "--host", host, "--port", str(port), *endpoint.vllm_options()]
    typer.echo("\n".join(["when vLLM says that it has started:", *how_to_ask(endpoint, host, port, api_key)]))
    sys.stdout.flush()
    key = {"VLLM_API_KEY": api_key} if api_key else {}  # as an option, `ps` would show it
    variables = endpoint.environment() | os.environ | key
    os.execve(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *command], variables)


def _serve_on_ray(endpoint: Endpoint, cluster: str | None, host: str, port: int, api_key: str | None) -> None:
    """Serves on a Ray cluster until Ctrl-C or SIGTERM. Raises ConfigError for options that do not fit the cluster, and
    QEError when the endpoint does not start."""
    logging.disable(logging.ERROR)  # log lines of Ray and vLLM
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while it starts, SIGTERM is like Ctrl-C
    try:
        from qe_cluster import launch
        from qe_cluster import serve as on_ray

        from qe_dist.serve.http.vllm_options import arguments
    except ImportError as error:
        raise ConfigError(f"Ray Serve lacks a package: {error}; pip install 'qe_dist[serve]', or use --local") from None
    cluster = joined(cluster)
    here = cluster is None
    if here:
        _check_port(host, port)
    arguments(endpoint.vllm_options())  # raises for an option that vLLM does not have
    ranks = endpoint.replicas * endpoint.tensor_parallel_size
    with launch.ray_cluster(cluster, ranks, on_ray.OBJECT_STORE_BYTES):
        gpus, cpus = on_ray.devices()
        endpoint = replace(endpoint, device="cuda" if gpus else "cpu")
        _check_devices(endpoint, gpus or cpus, "the Ray cluster", "GPUs" if gpus else "CPU slots")
        with on_ray.running(endpoint, host, port, api_key) as service:
            lines = how_to_ask(endpoint, service.host, port, api_key)
            typer.echo("\n".join([*lines, *(f"metrics: {url}" for url in service.metrics)]))
            with stopping() as stop:
                stop.wait()
                typer.echo(f"stopping: running requests have {endpoint.drain_seconds} s")
                service.drain()
        if not here:
            on_ray.leave()


def how_to_ask(endpoint: Endpoint, host: str, port: int, api_key: str | None) -> list[str]:
    """Lines with the URL of the endpoint, and a command that sends it a request."""
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    asked = {"model": endpoint.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}
    variable = next((name for name in KEYS if os.environ.get(name)), KEYS[0])
    key = f' -H "Authorization: Bearer ${variable}"' if api_key else ""
    data = shlex.quote(json.dumps(asked))
    return [
        f"{endpoint.name} at {url}/v1",
        f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {data}",
    ]


def _check_port(host: str, port: int) -> None:
    """Raises ConfigError when this process cannot listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen at --host {host} --port {port}: {error.strerror}") from None


def _check_devices(endpoint: Endpoint, found: int, where: str, of: str = "GPUs") -> None:
    """Raises ConfigError when there are fewer devices than ranks, since each rank needs its own.

    found: number of devices; 0: a machine without GPUs, which serves on its CPU.
    """
    wanted = endpoint.replicas * endpoint.tensor_parallel_size
    if found and wanted > found:
        raise ConfigError(
            f"--replicas {endpoint.replicas} of --tensor-parallel-size {endpoint.tensor_parallel_size} need {wanted} "
            f"{of}, and {where} has {found}"
        )
