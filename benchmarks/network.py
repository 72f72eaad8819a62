"""Hosts on one machine: processes, memory file system, host name and address of their own, and a wire with delay
and bandwidth between them. For Linux and root; nothing outlives the process that made it, even one that is killed.

A host is the namespaces of an idle process that ends when its standard input does, which takes all other processes
of the host with it. Its card `eth0` is a tap device: what the host sends goes through a token bucket of the
kernel, then to the switch, a process that hands every frame over after the delay (kernels for small virtual
machines often lack netem). Frames are 9000 bytes, as on the network of a cluster.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shlex
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

T = TypeVar("T")
FRAME_BYTES = 9000 + 14
CLONE_NEWNET, TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0002, 0x1000


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    pid: int
    """Of the idle process, as seen from outside."""

    def command(self, *words: str) -> list[str]:
        """What runs these words inside the host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--uts", "--", *words]

    def run(self, *words: str, env: Mapping[str, str] | None = None) -> str:
        """Runs a short command; returns what it prints; RuntimeError where it fails."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, env=env, timeout=120)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {shlex.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def within(self, call: Callable[[], T]) -> T:
        """Calls in a thread that has entered the network of this host: sockets made there stay there."""

        def enter() -> T:
            with open(f"/proc/{self.pid}/ns/net") as there:
                if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter the network of {self.name}")
            return call()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(enter).result()

    def cut(self) -> None:
        """Takes the card down: no frame leaves or arrives, and no connection is told."""
        self.run("ip", "link", "set", "eth0", "down")

    def mend(self) -> None:
        self.run("ip", "link", "set", "eth0", "up")

    def traffic(self) -> dict[str, int]:
        """Bytes that the card has sent and received."""
        (card,) = json.loads(self.run("ip", "-json", "-statistics", "link", "show", "eth0"))
        return {"sent": card["stats64"]["tx"]["bytes"], "received": card["stats64"]["rx"]["bytes"]}

    def processes(self, pattern: str) -> int:
        """How many processes run here whose name matches."""
        found = subprocess.run(self.command("pgrep", pattern), capture_output=True, text=True)
        return len(found.stdout.split())


def why_not() -> str | None:
    """Why this machine cannot make hosts; None where it can."""
    if sys.platform != "linux" or os.geteuid():
        return "network namespaces need Linux and root"
    try:
        with network(["probe"], 0.0, 100.0):
            return None
    except (OSError, RuntimeError) as error:
        return f"network namespaces are not allowed here: {error}"


@contextmanager
def network(names: Sequence[str], delay_ms: float, mbit: float) -> Iterator[list[Host]]:
    """Hosts 10.77.0.1, 10.77.0.2, ... of these names.

    delay_ms: in each direction. mbit: what each host can send, in Mbit/s.
    """
    with ExitStack() as stack:
        hosts = [stack.enter_context(_host(name, f"10.77.0.{i}")) for i, name in enumerate(names, start=1)]
        cards = [host.within(_tap) for host in hosts]
        for host, card in zip(hosts, cards, strict=True):
            stack.callback(os.close, card)
            host.run("sh", "-ec", _CARD.format(address=host.address, mbit=mbit))
        words = [sys.executable, __file__, str(delay_ms), *map(str, cards)]
        switch = stack.enter_context(subprocess.Popen(words, pass_fds=cards, stdin=subprocess.PIPE))
        stack.callback(switch.kill)
        yield hosts


@contextmanager
def _host(name: str, address: str) -> Iterator[Host]:
    words = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--mount-proc", "sh", "-ec", _BOOT, name]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as outer:
        if not outer.stdout.readline():
            raise OSError(outer.stderr.read().decode().strip())
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text()
        try:
            yield Host(name, address, int(children))
        finally:
            outer.stdin.close()


# With SIGCHLD ignored the kernel buries orphans, as init would: to Ray, a dead raylet that nobody buries is alive.
_BOOT = """
mount -t tmpfs shm /dev/shm
hostname $0
ip link set lo up
echo
exec env --ignore-signal=CHLD cat > /dev/null
"""
_CARD = """
ip link set eth0 mtu 9000 up
ip address add {address}/24 dev eth0
tc qdisc add dev eth0 root tbf rate {mbit}mbit burst 256kb latency 200ms
"""


def _tap() -> int:
    card = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(card, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP | IFF_NO_PI))
    return card


def switch(delay: float, cards: Sequence[int]) -> None:
    """Hands every frame to the card of its receiver, `delay` seconds later; ends with standard input."""
    learned: dict[bytes, int] = {}
    waiting: deque[tuple[float, list[int], bytes]] = deque()
    while True:
        rest = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([*cards, sys.stdin], [], [], rest)
        if sys.stdin in ready:
            return
        for card in ready:
            frame = os.read(card, FRAME_BYTES)
            to, sender = frame[:6], frame[6:12]
            learned[sender] = card
            receivers = [learned[to]] if to in learned else [other for other in cards if other != card]
            waiting.append((time.monotonic() + delay, receivers, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, receivers, frame = waiting.popleft()
            for card in receivers:
                _hand_over(card, frame)


def _hand_over(card: int, frame: bytes) -> None:
    with contextlib.suppress(OSError):  # the card is down, or its queue is full: a wire loses the frame
        os.write(card, frame)


def round_trip_ms(one: Host, other: Host, count: int = 21) -> float:
    """Median time of a byte to the other host and back, over TCP."""
    with _connection(one, other) as (near, far):
        return 1000 * median(_echo(near, far, 1) for _ in range(count))


def megabits(one: Host, other: Host, size: int = 4 * 2**20) -> float:
    """Mbit/s of a transfer over TCP."""
    with _connection(one, other) as (near, far):
        return 8e-6 * size / _echo(near, far, size)


def _echo(near: socket.socket, far: socket.socket, size: int) -> float:
    """Seconds for `size` bytes there, and one byte back."""
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(near.sendall, bytes(size))
        left = size
        while left:
            left -= len(far.recv(left))
        sent.result()
    far.sendall(b"!")
    near.recv(1)
    return time.perf_counter() - start


@contextmanager
def _connection(one: Host, other: Host) -> Iterator[tuple[socket.socket, socket.socket]]:
    with closing(other.within(lambda: socket.create_server((other.address, 0)))) as server:
        port = server.getsockname()[1]
        with closing(one.within(lambda: socket.create_connection((other.address, port), timeout=30))) as near:
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far, _ = server.accept()
            with closing(far):
                yield near, far


if __name__ == "__main__":
    switch(float(sys.argv[1]) / 1000, [int(card) for card in sys.argv[2:]])
