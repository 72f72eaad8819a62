"""An endpoint on Ray: replicas of vLLM behind the HTTP proxies of Ray Serve.

A replica is the server of `ray.serve.llm`, which starts vLLM on what Ray gave it. It answers HTTP by vLLM's own
application instead of Ray's copy of it, so that an endpoint on a cluster is what `vllm serve` is on one machine.
"""

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import TypeAdapter
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer

from qe_dist.core.errors import QEError
from qe_dist.serve.http.endpoint import Endpoint
from qe_dist.serve.http.traffic import Traffic
from qe_dist.serve.http.vllm_options import arguments

HEALTH_SECONDS = 5.0
"""How often Ray asks a replica whether its engine lives."""
PROXY_SECONDS = 30.0
"""A proxy has this long to start listening."""
START_TRIES = 2
"""A replica is started so many times before an endpoint that never answered counts as failed."""
OBJECT_STORE_BYTES = 2**28
"""Requests and answers pass through the object store, weights do not."""


@serve.ingress()
class Replica(LLMServer):
    """vLLM and its HTTP application."""

    async def __init__(self, llm_config: LLMConfig, environment: dict[str, str], api_key: str | None) -> None:  # type: ignore[misc]  # Ray awaits it
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        if api_key:
            os.environ["VLLM_API_KEY"] = api_key
        self.traffic = Traffic()
        await super().__init__(llm_config)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        app = await super().__serve_build_asgi_app__()
        app.add_middleware(self.traffic.around)
        return app

    async def drain(self) -> None:
        """Refuses new requests, and returns when no old one is left."""
        await self.traffic.drain()


@dataclass(frozen=True)
class Service:
    """An endpoint that answers."""

    endpoint: Endpoint
    handle: DeploymentHandle
    host: str
    metrics: list[str]
    """URLs, one for each node, where Prometheus finds vLLM's counters and Ray's."""

    def drain(self) -> None:
        """Returns when all running requests have ended. Raises QEError when that takes more than `drain_seconds`."""
        try:
            self.handle.broadcast("drain").results(timeout_s=self.endpoint.drain_seconds, return_exceptions=True)
        except TimeoutError:
            raise QEError(
                f"some requests were still running after {self.endpoint.drain_seconds} s and were cut off; "
                "--drain gives them longer"
            ) from None


def application(fields: dict[str, Any]) -> serve.Application:
    """Builds the endpoint of a Ray Serve config file (cluster/rayservice.yaml), which gives the fields of Endpoint.

    The API key is VLLM_API_KEY in the environment of the nodes. The cluster may still be without nodes.
    """
    return build(TypeAdapter(Endpoint).validate_python(fields), None)


def build(endpoint: Endpoint, api_key: str | None) -> serve.Application:
    """Returns the application that `serve.run` deploys. Starts nothing.

    api_key: that requests must carry; None: VLLM_API_KEY of the nodes, if it is set there.
    """
    engine, on_gpus = arguments(endpoint.vllm_options()), endpoint.device == "cuda"
    name = engine.pop("served_model_name")[0]
    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": endpoint.checkpoint},
        engine_kwargs=engine,
        # On CPUs all ranks of a replica are processes of one node.
        placement_group_config=None if on_gpus else {"bundles": [{"CPU": endpoint.tensor_parallel_size}]},
        deployment_config={
            "num_replicas": endpoint.replicas,
            "ray_actor_options": {"num_cpus": 1 if on_gpus else 0},
            "max_ongoing_requests": endpoint.max_requests,
            "max_queued_requests": endpoint.max_requests,
            "graceful_shutdown_timeout_s": endpoint.drain_seconds,
            "health_check_period_s": HEALTH_SECONDS,
            "max_constructor_retry_count": START_TRIES,
        },
    )
    return build_llm_deployment(
        config,
        deployment_cls=Replica,
        bind_kwargs={"environment": endpoint.environment(), "api_key": api_key},  # Ray logs all other arguments
        override_serve_options={"backpressure_config": {"retry_after_s": 1}},
    )


def devices() -> tuple[int, int]:
    """GPUs and CPU slots of the cluster."""
    found = ray.cluster_resources()
    return int(found.get("GPU", 0)), int(found.get("CPU", 0))


@contextmanager
def running(endpoint: Endpoint, host: str, port: int, api_key: str | None) -> Iterator[Service]:
    """An endpoint on the cluster that this process is connected to, for as long as the context lasts.

    host, port: where the proxies of Ray Serve listen. Raises QEError when the endpoint does not start.
    """
    serve.start(http_options={"host": host, "port": port})
    _check_proxy(_address(host), port)
    try:
        yield Service(endpoint, _deploy(endpoint, api_key), _address(host), _metrics())
    finally:
        serve.delete(endpoint.name)


def leave() -> None:
    """Ends Ray Serve unless it serves other applications. The cluster goes on."""
    if not serve.status().applications:
        serve.shutdown()


def _deploy(endpoint: Endpoint, api_key: str | None) -> DeploymentHandle:
    try:
        return serve.run(build(endpoint, api_key), name=endpoint.name, route_prefix="/")
    except (RuntimeError, ValueError, RayServeException, RayError) as error:
        raise QEError(f"the endpoint did not start: {_reason(endpoint.name, error)}") from None


def _reason(name: str, error: Exception) -> str:
    """Why an endpoint did not start: the last exception in the traceback that Ray Serve has of it."""
    status = serve.status().applications.get(name)
    messages = "\n".join(deployment.message for deployment in status.deployments.values()) if status else ""
    *_, last = re.split(r"^(?=[\w.]+(?:Error|Exception):)", messages or str(error), flags=re.MULTILINE)
    return f"{' '.join(last.split())} (its node has more in /tmp/ray/session_latest/logs)"


def _check_proxy(address: str, port: int) -> None:
    """Raises QEError when nothing listens there: a Ray Serve that already runs keeps its own host and port."""
    deadline = time.monotonic() + PROXY_SECONDS
    while True:
        try:
            return socket.create_connection((address, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise QEError(
                    f"no proxy of Ray Serve listens at {address}:{port} ({error.strerror or error}); if Serve already "
                    "runs on this cluster, give its --host and --port, or end it with `serve shutdown`"
                ) from None
            time.sleep(0.2)


def _address(host: str) -> str:
    """The address that requests go to: the head node's when the endpoint listens on all addresses."""
    head = next(node for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
    return head["NodeManagerAddress"] if host == "0.0.0.0" else host


def _metrics() -> list[str]:
    return [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in ray.nodes() if n["Alive"]]
