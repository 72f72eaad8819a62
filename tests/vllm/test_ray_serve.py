"""`qe-dist serve` as it is typed: real vLLM, on a local Ray cluster with two replicas, and alone.

The tests of the cluster share one endpoint, and each leaves it as it found it, but for the last one, which stops it.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.serving.load import CHAT, COMPLETIONS, answer, chat, request
from tests.vllm.questions import EQUAL, QUESTIONS, ROOT, Question, prompts
from tests.vllm.server import FLOAT32, KEY, MODEL, documented, environment, free_port

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.nightly]

RECIPE, REPLICAS, CLIENTS = "qe-w4a8", 2, 8
LIMIT = 8
"""Requests of a replica, running and waiting. As many more wait for any of them."""
START_SECONDS, END_SECONDS, BACK_SECONDS = 300, 90, 240
REPLICA, ENGINE = "ServeReplica", "EngineCore"
"""What their processes are called."""
STORY = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Command:
    """A `qe-dist serve` that runs, and what it prints."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def printed(self, beginning: str) -> str:
        """The line that begins so; waits for it."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for line in self.log.read_text().splitlines():
                if line.startswith(beginning):
                    return line
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text())

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=120)

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def find(self, name: str) -> psutil.Process | None:
        """A process that is called so, where there is one by now."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if name in "".join(process.cmdline()):
                    return process
        return None

    def metrics(self) -> list[str]:
        """As Prometheus reads them."""
        return httpx.get(self.printed("metrics: ").removeprefix("metrics: ")).text.splitlines()


@contextmanager
def served(line: str, checkpoint: Path, folder: Path, *options: str) -> Iterator[Command]:
    """A command line of ours; in the end it is gone, with all its processes."""
    port, log = free_port(), folder / "serve.log"
    words = shlex.split(line.replace("CHECKPOINT", str(checkpoint)))[1:]
    words += [f"--port={port}", f"--served-model-name={MODEL}", *options, "--", *FLOAT32]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "qe_pipelines.main", *words],
            env=environment(folder, 1) | {"QE_DIST_API_KEY": KEY},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    command = Command(process, port, log)
    started: list[psutil.Process] = []
    try:
        yield command
        started = command.processes() if process.poll() is None else []
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    _, left = psutil.wait_procs(started, timeout=20)
    assert not left


@pytest.fixture(scope="module")
def endpoint(checkpoints: dict[str, Path], folder: Path) -> Iterator[Command]:
    line = documented(f"qe-dist serve CHECKPOINT --replicas {REPLICAS}")
    with served(line, checkpoints[RECIPE], folder, f"--max-requests={LIMIT}") as command:
        command.printed("metrics: ")
        yield command


@pytest.fixture
def client(endpoint: Command) -> Iterator[httpx.Client]:
    with endpoint.client() as client:
        yield client


@dataclass
class Asked:
    """What came of questions that were asked until they were answered."""

    answers: dict[int, list[int]] = field(default_factory=dict)
    """Token ids by the number of the question."""
    errors: list[int] = field(default_factory=list)
    """Status of every request that was not answered."""

    def equal(self, offline: Sequence[dict[str, Any]]) -> int:
        return sum(offline[number]["tokens"] == tokens for number, tokens in self.answers.items())


def ask(endpoint: Command, questions: Sequence[Question], asked: Asked) -> None:
    """By several clients at once, which ask again after an error. Every request must end in a status."""
    numbers = iter(range(len(questions)))

    def one_client() -> None:
        with endpoint.client() as client:
            for number in numbers:
                path, body = request(questions[number], return_token_ids=True)
                while (reply := client.post(path, json=body)).status_code != 200:
                    asked.errors.append(reply.status_code)
                    time.sleep(0.5)
                asked.answers[number] = reply.json()["choices"][0]["token_ids"]

    with ThreadPoolExecutor(CLIENTS) as clients:
        for done in [clients.submit(one_client) for _ in range(CLIENTS)]:
            done.result()


def replicas_that_answered(endpoint: Command, enough: Callable[[set[str]], bool]) -> set[str]:
    """By Ray's names, as vLLM's counters tell. Asks until it is enough; counters are told every few seconds."""
    deadline = time.monotonic() + BACK_SECONDS
    while time.monotonic() < deadline:
        ask(endpoint, prompts()[:CLIENTS], Asked())
        told = [line for line in endpoint.metrics() if line.startswith("ray_vllm_request_success_total{")]
        counted = [line for line in told if float(line.rpartition(" ")[2]) > 0]
        found = {line.partition('ReplicaId="')[2].partition('"')[0] for line in counted}
        if enough(found):
            return found
        time.sleep(2)
    raise TimeoutError(f"only {found} answered")


def test_the_printed_curl_command_works(endpoint: Command) -> None:
    line = endpoint.printed("curl ")
    assert KEY not in line
    run = subprocess.run(["bash", "-c", line], env=os.environ | {"QE_DIST_API_KEY": KEY}, capture_output=True)
    assert json.loads(run.stdout)["choices"][0]["message"]["content"]


def test_health_needs_no_key_and_models_do(endpoint: Command) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{endpoint.port}") as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer open"}).status_code == 401
        assert client.post("/tokenize", json={"model": MODEL, "prompt": "?"}).status_code == 404


def test_images_are_answered_as_the_offline_engine_does(endpoint: Command, offline: Any) -> None:
    asked = Asked()
    ask(endpoint, prompts()[:48], asked)
    assert not asked.errors
    assert asked.equal(offline(1)[RECIPE]) >= EQUAL * 48


def test_replicas_fetch_no_image_and_read_only_so_much(client: httpx.Client) -> None:
    reply = client.post(CHAT, json=chat("What is it?", "http://127.0.0.1:1/image.png"))
    assert reply.status_code == 400
    assert "images must come with the request" in reply.text
    assert client.post(CHAT, content=bytes(2**26 + 1)).status_code == 413


def test_a_stream_comes_bit_by_bit(client: httpx.Client) -> None:
    asked = STORY | {"max_tokens": 64}
    whole, came, said = answer(client.post(COMPLETIONS, json=asked).json()), [], ""
    with client.stream("POST", COMPLETIONS, json=asked | {"stream": True}) as reply:
        for line in filter(None, reply.iter_lines()):
            came.append(time.monotonic())
            said += "" if line.endswith("[DONE]") else json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert said == whole
    assert came[-1] - came[0] > 0.5 * 64 * 0.005  # not all at the end


def test_more_than_the_limits_allow_are_told_to_come_back(endpoint: Command) -> None:
    def one(_: int) -> httpx.Response:
        with endpoint.client() as client:
            return client.post(COMPLETIONS, json=STORY | {"max_tokens": 100})

    with ThreadPoolExecutor(64) as clients:
        replies = list(clients.map(one, range(64)))
    refused = [reply for reply in replies if reply.status_code != 200]
    assert {reply.status_code for reply in refused} == {503}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert len(replies) - len(refused) >= REPLICAS * LIMIT


def test_of_two_replicas_one_is_killed_and_no_request_is_lost(endpoint: Command, offline: Any) -> None:
    """A replica with its engine; and then an engine alone, of which its replica has to tell Ray."""
    known = replicas_that_answered(endpoint, lambda known: len(known) == REPLICAS)

    def kill(victim: str, gone_seconds: float) -> None:
        questions, asked = prompts()[:QUESTIONS], Asked()
        clients = ThreadPoolExecutor(1).submit(ask, endpoint, questions, asked)
        while len(asked.answers) < 20 and not clients.done():
            time.sleep(0.05)
        killed = endpoint.find(victim)
        replica = killed.parent() if victim == ENGINE else killed
        rest = [p for p in (replica, *replica.children(recursive=True)) if p != killed]
        killed.kill()
        clients.result()
        assert len(asked.answers) == QUESTIONS
        assert asked.errors, f"{victim} was answering nothing"
        assert set(asked.errors) <= {500, 503}
        assert asked.equal(offline(1)[RECIPE]) >= EQUAL * QUESTIONS
        assert not psutil.wait_procs(rest, timeout=gone_seconds)[1]  # nor does the rest of it stay behind
        # Another came in its place; counters of dead ones stay.
        known.update(replicas_that_answered(endpoint, lambda now: bool(now - known)))

    kill(REPLICA, gone_seconds=10)
    kill(ENGINE, gone_seconds=60)  # Ray asks every few seconds, and then lets the replica end


def test_when_told_to_stop_it_ends_what_runs_and_refuses_what_comes(endpoint: Command, client: httpx.Client) -> None:
    started, ended, length = threading.Semaphore(0), [], 500

    def one_story() -> None:
        asked = STORY | {"max_tokens": length, "stream": True, "stream_options": {"include_usage": True}}
        with endpoint.client() as own, own.stream("POST", COMPLETIONS, json=asked) as reply:
            lines = filter(None, reply.iter_lines())
            next(lines)
            started.release()
            ended.append([*lines][-2:])

    stories = [threading.Thread(target=one_story) for _ in range(4)]
    for story in stories:
        story.start()
    for _ in stories:
        started.acquire()
    processes = endpoint.processes()
    endpoint.process.send_signal(signal.SIGTERM)
    endpoint.printed("stopping")
    deadline = time.monotonic() + 10
    while (refused := client.post(COMPLETIONS, json=STORY | {"max_tokens": 1})).status_code == 200:
        assert time.monotonic() < deadline
    assert refused.status_code == 503
    assert "stopping" in refused.json()["error"]["message"]
    for story in stories:
        story.join()
    for usage, done in ended:
        assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == length
        assert done == "data: [DONE]"
    assert len(ended) == len(stories)
    assert endpoint.process.wait(END_SECONDS) == 0
    assert not psutil.wait_procs(processes, timeout=20)[1]


def test_told_to_stop_while_it_starts_it_leaves_nothing_behind(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with served(documented("qe-dist serve CHECKPOINT --replicas"), checkpoints[RECIPE], tmp_path) as command:
        deadline = time.monotonic() + START_SECONDS
        while command.find(ENGINE) is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        processes = command.processes()
        command.process.terminate()
        assert command.process.wait(END_SECONDS) == 130
        assert not psutil.wait_procs(processes, timeout=20)[1]


def test_vllm_alone(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with served(documented("qe-dist serve CHECKPOINT --local"), checkpoints[RECIPE], tmp_path) as command:
        command.printed("(APIServer")
        line, deadline = command.printed("curl "), time.monotonic() + START_SECONDS
        environ = os.environ | {"QE_DIST_API_KEY": KEY}
        while not (said := subprocess.run(["bash", "-c", line], env=environ, capture_output=True).stdout):
            assert time.monotonic() < deadline
            assert command.process.poll() is None, command.log.read_text()
            time.sleep(0.5)
        assert json.loads(said)["choices"][0]["message"]["content"]
        with httpx.Client(base_url=f"http://127.0.0.1:{command.port}") as client:
            assert client.get("/v1/models").status_code == 401
        command.process.terminate()
        assert command.process.wait(END_SECONDS) == 0


def test_the_manifest_for_kubernetes_is_taken_by_ray_and_asks_for_its_gpus() -> None:
    """Built in a process of its own, which starts no replica."""
    script = """if True:
        import json, yaml
        from qe_cluster.launch import ray_cluster
        from qe_cluster.serve import application
        from ray.serve.schema import ServeDeploySchema
        spec = yaml.safe_load(open("cluster/rayservice.yaml"))["spec"]
        (told,) = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"])).applications
        with ray_cluster(None, 1):
            made = application(told.args)._bound_deployment
        bundles = made._replica_config.placement_group_bundles
        print(json.dumps([made.num_replicas, made.max_ongoing_requests, bundles]))
    """
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    replicas, requests, bundles = json.loads(run.stdout.splitlines()[-1])
    assert (replicas, requests) == (2, 256)
    assert [bundle["GPU"] for bundle in bundles] == [1] * 4
