"""A checkpoint behind real `vllm serve`, started and asked as docs/guides/serving.md says.

The engine behind HTTP is that of test_offline.py, which compares every recipe with transformers on one rank and on two.
A server must answer as that does. What HTTP adds (templates, images in base64, tokenizing, streaming, processes that
talk to each other) knows neither recipes nor ranks, so CI has one server, and the nightly run one for each.
"""

import asyncio
import http.client
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.serving.load import CHAT, Fault, answer, chat, faults, growth, inline, load, png, refusal, request
from tests.vllm.questions import EQUAL, QUESTIONS, STORIES, Question, prompts
from tests.vllm.server import KEY, MODEL, Server, documented, serving
from tests.vllm.twin import accuracy

pytestmark = pytest.mark.vllm

SHARED = "qe-w4a8"
"""Its server, on one rank, serves all tests but the first."""
OTHERS = [("qe-w4a16g64", 1), ("qe-w4a8", 2), ("rtn-w4a8", 2), ("qe-w4a16g64", 2), ("rtn-w4a8", 1)]


@pytest.fixture(scope="module")
def server(checkpoints: dict[str, Path], folder: Path) -> Iterator[Server]:
    with serving(checkpoints[SHARED], folder) as server:
        yield server


def asked_at_once(server: Server, questions: list[Question]) -> list[dict[str, Any]]:
    """The first choice of every reply, with token ids."""

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, headers=server.headers, timeout=300) as client:
            posts = [request(q, return_token_ids=True) for q in questions]
            return await asyncio.gather(*(client.post(path, json=body) for path, body in posts))

    replies = asyncio.run(ask())
    assert {reply.status_code for reply in replies} == {200}
    return [reply.json()["choices"][0] for reply in replies]


def check_answers(server: Server, offline: list[dict[str, Any]]) -> None:
    assert len(offline) == QUESTIONS + STORIES, offline
    given = asked_at_once(server, prompts())
    same = [a["tokens"] == b["token_ids"] for a, b in zip(offline, given, strict=True)]
    assert sum(same[:QUESTIONS]) >= EQUAL * QUESTIONS, f"{sum(same[:QUESTIONS])} answers equal"
    assert sum(same[QUESTIONS:]) > 0  # stories of 48 tokens may part ways
    texts = [{"text": answer({"choices": [choice]})} for choice in given]
    assert abs(accuracy(prompts(), texts) - accuracy(prompts(), offline)) <= 0.0051  # half a point: one question


@pytest.mark.nightly
@pytest.mark.parametrize(("recipe", "ranks"), OTHERS)
def test_answers_are_those_of_the_offline_engine(
    recipe: str, ranks: int, checkpoints: Any, offline: Any, tmp_path: Path
) -> None:
    wanted = offline(ranks)[recipe]  # before there is a server, which takes a share of the cores even when nobody asks
    with serving(checkpoints[recipe], tmp_path, f"--tensor-parallel-size={ranks}", ranks=ranks) as server:
        check_answers(server, wanted)


@pytest.mark.nightly
def test_the_shared_server_does_so_too(server: Server, offline: Any) -> None:
    check_answers(server, offline(1)[SHARED])


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers=server.headers, timeout=60) as client:
        yield client


def test_the_commands_of_the_page_work(server: Server) -> None:
    question = prompts()[0]

    def ours(text: str) -> str:
        text = text.replace("http://localhost:8000", server.url).replace("localhost:8000", server.url)
        return text.replace("CHECKPOINT", MODEL).replace("IMAGE", question.image).replace("$VLLM_API_KEY", KEY)

    curl = ours(documented("curl -s localhost:8000"))
    said = subprocess.run(["bash", "-ec", curl], capture_output=True, text=True, check=True).stdout
    assert f'"content":"{question.answer}"' in said
    script = ours(documented("import base64, openai, os"))
    words = [sys.executable, "-c", f"import os; os.environ['VLLM_API_KEY'] = '{KEY}'\n{script}"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == question.answer


@pytest.mark.parametrize("index", [5, -1], ids=["image", "story"])
def test_a_stream_adds_up_to_the_answer(client: httpx.Client, index: int) -> None:
    path, body = request(prompts()[index])
    whole = answer(client.post(path, json=body).json())
    with client.stream("POST", path, json=body | {"stream": True}) as reply:
        events = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    choices = [httpx.Response(200, text=event).json()["choices"][0] for event in events[:-1]]
    assert "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices) == whole
    assert events[-1] == "[DONE]"
    assert len(choices) > 2


@pytest.mark.nightly
def test_logprobs_are_those_of_the_offline_engine(client: httpx.Client, offline: Any) -> None:
    path, body = request(prompts()[0], logprobs=True)
    told = client.post(path, json=body).json()["choices"][0]["logprobs"]["content"]
    wanted = offline(1)[SHARED][0]["logprobs"]
    assert [token["logprob"] for token in told] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: fault.name)
def test_a_bad_request_gets_a_clear_4xx(server: Server, fault: Fault) -> None:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(base_url=server.url, headers=server.headers, timeout=60) as client:
            return await refusal(client, fault)

    reply = asyncio.run(ask())
    assert reply.status_code == fault.status, reply.text
    assert fault.says in reply.text


def test_nothing_is_fetched(client: httpx.Client) -> None:
    """A server that would be asked for the image is asked for nothing."""
    fetched = []

    async def ask() -> int:
        async def told(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            fetched.append(await reader.readline())
            writer.close()

        async with await asyncio.start_server(told, "127.0.0.1", 0) as bait:
            url = f"http://127.0.0.1:{bait.sockets[0].getsockname()[1]}/image.png"
            reply = await asyncio.to_thread(client.post, CHAT, json=chat("What is it?", url))
        return reply.status_code

    assert asyncio.run(ask()) == 400
    assert not fetched


@pytest.mark.parametrize("path", ["/invocations", "/tokenize", "/generative_scoring", "/scale_elastic_ep", "/docs"])
def test_what_no_key_guards_is_not_there(server: Server, path: str) -> None:
    body = {"model": MODEL, "prompt": "hello", "messages": [{"role": "user", "content": "hello"}]}
    assert httpx.post(f"{server.url}{path}", json=body).status_code == 404
    assert httpx.get(f"{server.url}{path}").status_code == 404


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/metrics"])
def test_probes_need_no_key(server: Server, path: str) -> None:
    assert httpx.get(f"{server.url}{path}").status_code == 200


@pytest.mark.parametrize("told", [True, False], ids=["length told", "in chunks"])
def test_a_body_over_the_limit_is_not_read(server: Server, told: bool) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", CHAT)
    for name, value in server.headers.items():
        connection.putheader(name, value)
    connection.putheader("Content-Type", "application/json")
    if told:
        connection.putheader("Content-Length", str(2**30))
        connection.endheaders()
    else:
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        piece = b"%x\r\n%s\r\n" % (2**20, b" " * 2**20)
        for _ in range(65):
            connection.send(piece)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_large_but_honest_photograph_is_answered(client: httpx.Client) -> None:
    reply = client.post(CHAT, json=chat("What color is the triangle?", inline(png(4000, 3000))))
    assert reply.status_code == 200


@pytest.mark.nightly
def test_load_with_cancelled_and_malformed_requests_harms_nobody(server: Server) -> None:
    """A small version of benchmarks/serving/load.py."""
    questions = prompts()
    rounds = asyncio.run(load(server, [*questions[:60], *questions[-5:]], rounds=4))
    for one in rounds:
        assert one.good == 225
        assert one.cancelled == 30
        assert sum(one.refused.values()) == 45
        assert one.unclear == []
        assert one.left == {}
        assert one.other_questions <= (1 - EQUAL) * one.good
    assert growth(rounds, warm_up=2) < 50
    assert server.process.poll() is None
