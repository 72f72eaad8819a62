"""Ends this process with exit code 75 when the cluster that it drives is gone.

Ray would end it too, from C++ and without a word to Python: with 0, which stands for a finished checkpoint, when the
raylet of this machine ends, and with 1 when the head does not answer for a minute.
"""

import os
import select
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import psutil
import ray

CHECK_SECONDS = 2.0
"""Between two looks at the head."""
MISSED_CHECKS = 20
"""The head counts as lost after so many looks at which it took no connection; Ray waits for 60 s."""
AGAIN = "type the same command again, nothing finished is lost"


@contextmanager
def ending_with_cluster() -> Iterator[None]:
    """Watches, for as long as the context lasts, the cluster that this process is connected to."""
    over, end = os.pipe()
    with ExitStack() as held:
        held.callback(os.close, over)
        held.callback(os.close, end)
        thread = threading.Thread(target=_watch, args=(over, _raylet(held)), name="cluster watch", daemon=True)
        thread.start()
        held.callback(thread.join)
        held.callback(os.write, end, b"over")
        yield


def _raylet(held: ExitStack) -> int | None:
    """A handle that is readable when the raylet of this machine has ended; None where it cannot be seen: in another
    container, or not on Linux."""
    here = ray._private.worker._global_node
    option = f"--raylet_socket_name={here.raylet_socket_name}"  # type: ignore[attr-defined]  # set once connected
    with suppress(OSError, AttributeError):
        for process in psutil.process_iter(["cmdline"]):
            if option in (process.info["cmdline"] or ()):
                handle = os.pidfd_open(process.pid)
                held.callback(os.close, handle)
                return handle
    return None


def _watch(over: int, raylet: int | None) -> None:
    head, missed = ray.get_runtime_context().gcs_address, 0
    while over not in (ready := select.select([over, *([raylet] if raylet else [])], [], [], CHECK_SECONDS)[0]):
        if ready:
            _end("the Ray node that this command is connected to was lost (`dmesg` tells whether memory ran out)")
        missed = 0 if _takes_connections(head) else missed + 1
        if missed > MISSED_CHECKS:
            _end(f"the head of the Ray cluster at {head} was lost")


def _takes_connections(address: str) -> bool:
    """Whether its machine and its process are there; a head that is busy takes connections too."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CHECK_SECONDS).close()
    except OSError:
        return False
    return True


def _end(why: str) -> None:
    print(f"error: {why}; {AGAIN}", file=sys.stderr, flush=True)
    os._exit(os.EX_TEMPFAIL)
