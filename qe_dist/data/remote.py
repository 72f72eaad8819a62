"""Fetches an image from an http or https address: bounded in bytes, seconds and redirects, from public addresses alone.

A calibration file is often somebody else's, and the machine that reads it often stands in a network of its own: what
only that network shows must not be reached by a line of such a file. The address is resolved once, checked, and then
connected to. Proxies are not used.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import SplitResult, urljoin, urlsplit

from qe_dist.core.errors import ConfigError

MAX_BYTES = 32 * 2**20
SECONDS = 20.0
"""For one image, redirects included."""
REDIRECTS = 3

Allowed = Callable[[str], bool]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet: not private, of this machine, of this link, or reserved."""
    found = ipaddress.ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_global and not found.is_multicast


def fetch(url: str, origin: str, allowed: Allowed = is_public) -> bytes:
    """The bytes at an address. ConfigError, which names origin and address, where it is not reached within bounds."""
    deadline = time.monotonic() + SECONDS
    place = url
    for _ in range(REDIRECTS + 1):
        try:
            status, headers, content = _get(urlsplit(place), deadline, allowed)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ConfigError(f"{origin}: {url[:200]} cannot be fetched: {error or type(error).__name__}") from None
        if status in (301, 302, 303, 307, 308) and "location" in headers:
            place = urljoin(place, headers["location"])
        elif status == 200:
            return content
        else:
            raise ConfigError(f"{origin}: {url[:200]} cannot be fetched: the server answers {status}")
    raise ConfigError(f"{origin}: {url[:200]} cannot be fetched: more than {REDIRECTS} redirects")


def _get(url: SplitResult, deadline: float, allowed: Allowed) -> tuple[int, http.client.HTTPMessage, bytes]:
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"{url.geturl()[:200]} is no http or https address")
    connection = http.client.HTTPConnection(url.hostname, url.port)
    connection.sock = _connected(url, deadline, allowed)
    # A server that sends a byte now and then keeps every single read in time; this ends them all.
    end = threading.Timer(_left(deadline), connection.sock.shutdown, [socket.SHUT_RDWR])
    end.start()
    try:
        target = f"{url.path or '/'}{'?' + url.query if url.query else ''}"
        host = url.netloc.rpartition("@")[2]
        connection.request("GET", target, headers={"Host": host, "User-Agent": "qe-dist", "Accept": "image/*"})
        answer = connection.getresponse()
        return answer.status, answer.headers, _body(answer) if answer.status == 200 else b""
    except (OSError, http.client.HTTPException, ValueError):
        _left(deadline)
        raise
    finally:
        end.cancel()
        connection.close()


def _connected(url: SplitResult, deadline: float, allowed: Allowed) -> socket.socket:
    port = url.port or (443 if url.scheme == "https" else 80)
    found = socket.getaddrinfo(url.hostname, port, type=socket.SOCK_STREAM)
    if refused := next((address[0] for *_, address in found if not allowed(str(address[0]))), None):
        raise ValueError(f"{url.hostname} is {refused}, which is no public address; download the image first")
    plain = socket.create_connection((str(found[0][4][0]), port), timeout=_left(deadline))
    if url.scheme == "http":
        return plain
    return ssl.create_default_context().wrap_socket(plain, server_hostname=url.hostname)


def _body(answer: http.client.HTTPResponse) -> bytes:
    content = answer.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES // 2**20} MiB")
    if answer.length:
        raise ValueError("the connection ended in the middle of it")
    return content


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"it takes longer than {SECONDS:.0f} s")
    return left
