"""`qe-dist serve` on a local Ray cluster, as it is typed: two replicas, real vLLM, HTTP clients, and a killed process.

The tests share one endpoint, and run in the order that is written: the last one stops it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from qe_dist.serve.endpoint import Endpoint

from tests.vllm.http import chat
from tests.vllm.questions import ROOT, Question, prompts
from tests.vllm.test_offline import EQUAL, answers

pytestmark = [pytest.mark.vllm, pytest.mark.ray]

RECIPE, KEY, REPLICAS = "qe-w4a8", "sesame", 2
LIMIT = 8
"""Requests of a replica, running and waiting; as many may wait in front of them."""
ASKED = 48
START_SECONDS, BACK_SECONDS = 300, 240


@dataclass(frozen=True)
class Running:
    """The command and what it printed."""

    process: subprocess.Popen[str]
    port: int
    lines: tuple[str, ...]

    @property
    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=120)

    def line(self, beginning: str) -> str:
        return next(line.removeprefix(beginning) for line in self.lines if line.startswith(beginning))

    def replicas(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.process.pid).children(recursive=True) if _is_replica(p)]

    def answered(self) -> dict[str, float]:
        """Requests by the replica that answered them, as Prometheus would read it."""
        found: dict[str, float] = {}
        for line in httpx.get(self.line("metrics: ")).text.splitlines():
            if line.startswith("ray_vllm_request_success_total{"):
                replica = line.partition('ReplicaId="')[2].partition('"')[0]
                found[replica] = found.get(replica, 0) + float(line.rpartition(" ")[2])
        return found


def _is_replica(process: psutil.Process) -> bool:
    try:
        return "ServeReplica" in "".join(process.cmdline())
    except psutil.Error:
        return False
