"""Images at addresses: bounded in bytes, seconds and redirects, and from public addresses alone."""

import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from qe_dist.core.errors import ConfigError
from qe_dist.data import remote
from qe_dist.data.options import ReadOptions
from qe_dist.data.remote import fetch, is_public
from qe_dist.data.samples import read
from tests.tiny import DATA

IMAGE = (DATA / "calibration" / "000.png").read_bytes()


class Images(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.protocol_version = "HTTP/1.1"
        name = self.path.removeprefix("/")
        if name.startswith("hop"):
            count = int(name[3:])
            self._head(302, {"Location": f"/hop{count - 1}" if count else "/a.png", "Content-Length": "0"})
        elif name == "inside":
            self._head(302, {"Location": "http://169.254.169.254/latest", "Content-Length": "0"})
        elif name == "file":
            self._head(302, {"Location": "file:///etc/passwd", "Content-Length": "0"})
        elif name == "slow":
            self._head(200, {"Content-Length": "1000"})
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif name == "cut":
            self._head(200, {"Content-Length": str(len(IMAGE))})
            self.wfile.write(IMAGE[:100])
        elif name == "a.png?x=1&y=a%20b":
            self._head(200, {"Content-Length": str(len(IMAGE))})
            self.wfile.write(IMAGE)
        elif name == "a.png":
            self._head(200, {})  # without a length: it ends with the connection
            self.wfile.write(IMAGE)
        elif name == "big":
            self._head(200, {})
            for _ in range(40):
                self.wfile.write(bytes(2**15))
        else:
            self._head(404, {"Content-Length": "0"})
        self.close_connection = True

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Connection": "close"}.items():
            self.send_header(key, value)
        self.end_headers()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Images)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  (a client that gives up)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def here(ip: str) -> bool:
    return ip == "127.0.0.1"


@pytest.mark.parametrize("name", ["a.png", "a.png?x=1&y=a%20b", "hop0", "hop2"])
def test_an_image_is_fetched(name: str, address: str) -> None:
    assert fetch(f"{address}/{name}", "a:1", here) == IMAGE


FAULTS = {
    "hop3": "more than 3 redirects",
    "inside": "169.254.169.254 is 169.254.169.254, which is no public address",
    "file": "is no http or https address",
    "cut": "the connection ended in the middle",
    "gone": "the server answers 404",
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_reached_within_bounds_is_refused(name: str, address: str) -> None:
    with pytest.raises(ConfigError, match=f"a:1: {address}/{name} cannot be fetched: .*{FAULTS[name]}"):
        fetch(f"{address}/{name}", "a:1", here)


def test_bytes_and_seconds_are_bounded(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_BYTES", 2**20)
    with pytest.raises(ConfigError, match="it has more than 1 MiB"):
        fetch(f"{address}/big", "a:1", here)
    monkeypatch.setattr(remote, "SECONDS", 0.3)
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="longer than"):
        fetch(f"{address}/slow", "a:1", here)
    assert time.monotonic() - begin < 2


PRIVATE = (
    "127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
    "::1", "fe80::1", "fc00::1", "::ffff:10.0.0.1", "::",
)  # fmt: skip


def test_addresses_of_this_network_are_not_public() -> None:
    assert [ip for ip in PRIVATE if is_public(ip)] == []
    assert all(map(is_public, ("93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946")))


def test_only_the_option_opens_addresses_and_never_those_of_this_network(address: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"image": f"{address}/a.png", "text": "A ring."}))
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: .* is remote; download it first, or give --allow-remote"):
        read(path)
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1 is 127\.0\.0\.1, which is no public address"):
        read(path, ReadOptions(allow_remote=True))


def test_an_image_is_fetched_once(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_dist.data.places.fetch", lambda url, origin: fetch(url, origin, here))
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"image": f"{address}/a.png", "text": "A ring."})] * 2))
    one, two = read(path, ReadOptions(allow_remote=True)).samples
    assert one.digest == two.digest
    assert one.images[0].begin == two.images[0].begin
