"""The real S3 protocol on this machine: moto's server, with a meter and faults in front of it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch
from urllib.request import Request, urlopen

import fsspec

BUCKET = "models"


class Meter:
    """Counts what a storage was asked for; cuts the next `faults` connections."""

    def __init__(self, app, url: str) -> None:
        self.app, self.url = app, url
        self.faults = 0
        self.reset()

    def empty(self) -> None:
        """Leaves one bucket with nothing in it."""
        urlopen(Request(f"{self.url}/moto-api/reset", method="POST")).close()
        forget_connections()
        fsspec.filesystem("s3").mkdir(BUCKET)
        self.reset()

    def remove_bucket(self) -> None:
        fsspec.filesystem("s3").rm(BUCKET, recursive=True)

    def reset(self) -> None:
        self.gets: list[str] = []
        self.puts: list[str] = []
        self.bytes_out = self.bytes_in = 0

    def __call__(self, environ, start_response) -> Iterator[bytes]:
        if self.faults:
            self.faults -= 1
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        {"GET": self.gets, "PUT": self.puts}.get(method, []).append(path.removeprefix(f"/{BUCKET}/"))
        self.bytes_in += int(environ.get("CONTENT_LENGTH") or 0)
        for part in self.app(environ, start_response):
            self.bytes_out += len(part)
            yield part


@contextmanager
def s3_server() -> Iterator[Meter]:
    """s3://models, for this process and those that it starts."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    meter = server._server.app = Meter(server._server.app, url)
    account = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    with patch.dict(os.environ, account | {"AWS_ENDPOINT_URL": url}):
        meter.empty()
        yield meter
        forget_connections()
    server.stop()


def forget_connections() -> None:
    """fsspec keeps one client per protocol and process."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
