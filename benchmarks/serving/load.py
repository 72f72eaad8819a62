"""Loads a real `vllm serve` with hundreds of requests at once: good, cancelled, and malformed ones.

    python benchmarks/serving/load.py CHECKPOINT [--rounds 10]    writes benchmarks/results/serving_load.json

To be run in .venv-vllm. Every round sends the same 300 requests in another order, all at once. Good ones must get the
answer that they got alone, malformed ones a 4xx that says why, and all that the server takes for a round must be
given back: memory, requests, blocks of the KV cache.
"""

import argparse
import asyncio
import base64
import io
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image
from qe_pipelines.results import write_result

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.vllm.questions import Question, prompts  # noqa: E402
from tests.vllm.server import MODEL, Server, serving  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "serving_load.json"
REQUESTS, CANCELLED, MALFORMED = 300, 30, 45
"""Of a round; the others are good: questions about images, and texts."""
STORY_TOKENS = 48
SETTLED = 20.0
"""Seconds within which a server is quiet again."""
METRICS = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Body = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """A request that must be refused."""

    name: str
    status: int
    says: str
    body: Body | bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Round:
    """What came of the requests of a round, and what the server holds after it."""

    seconds: float = 0.0
    good: int = 0
    cancelled: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """By status."""
    other_questions: int = 0
    """Answers to questions that were not those of the quiet server."""
    other_stories: int = 0
    unclear: list[str] = field(default_factory=list)
    """Malformed requests that got anything but the refusal that they should."""
    mib: float = 0.0
    """Proportional set size of all processes of the server."""
    left: dict[str, float] = field(default_factory=dict)
    """Of METRICS, what does not go back to zero."""


def png(width: int, height: int) -> str:
    """A black image in base64, a byte for every 8000 pixels or so."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def inline(data: str) -> str:
    return f"data:image/png;base64,{data}"


def chat(text: str, *images: str, **settings: Any) -> Body:
    """A greedy chat request. images: URLs."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in images] + [{"type": "text", "text": text}]
    message = {"role": "user", "content": content}
    return {"model": MODEL, "messages": [message], "temperature": 0, "max_tokens": STORY_TOKENS, **settings}


def request(question: Question, **settings: Any) -> tuple[str, Body]:
    """Path and body that ask a question about an image, or continue a story."""
    if question.image:
        seen = base64.b64encode(Path(question.image).read_bytes()).decode()
        return CHAT, chat(question.text, inline(seen), **settings)
    return COMPLETIONS, {
        "model": MODEL, "prompt": question.text, "temperature": 0, "max_tokens": STORY_TOKENS, **settings,
    }  # fmt: skip


def answer(reply: dict[str, Any]) -> str:
    choice = reply["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def faults() -> list[Fault]:
    """What clients send by mistake or in malice."""
    sound = png(56, 56)
    cut = base64.b64encode(base64.b64decode(png(512, 512))[:60]).decode()
    what = "What is it?"
    return [
        Fault("broken base64", 400, "base64", chat(what, inline("!!" + sound))),
        Fault("cut image", 400, "Failed to load image", chat(what, inline(cut))),
        Fault("not an image", 400, "cannot identify image", chat(what, inline("aGVsbG8="))),
        Fault("no base64", 400, "must come with the request", chat(what, "data:image/png,abc")),
        Fault("30000 x 30000 pixels", 400, "900000000 pixels", chat(what, inline(png(30000, 30000)))),
        Fault("9000 x 9000 pixels", 400, "81000000 pixels", chat(what, inline(png(9000, 9000)))),
        Fault("5000 x 1 pixels", 400, "size=5000x1", chat(what, inline(png(5000, 1)))),
        Fault("too many images", 400, "At most 4 image", chat(what, *[inline(sound)] * 5)),
        Fault("over-long prompt", 400, "maximum context length", chat("word " * 2000)),
        Fault("image by http", 400, "must come with the request", chat(what, "http://127.0.0.1:9/image.png")),
        Fault(
            "image by file",
            400,
            "must come with the request",
            chat(what, f"file://{ROOT}/models/data/evaluation/000.png"),
        ),
        Fault("unknown model", 404, "does not exist", chat(what) | {"model": "another"}),
        Fault("wrong key", 401, "Unauthorized", chat(what), {"Authorization": "Bearer wrong"}),
        Fault("broken JSON", 400, "JSON decode error", b'{"model": ', {"Content-Type": "application/json"}),
    ]


async def refusal(client: httpx.AsyncClient, fault: Fault) -> httpx.Response:
    body = {"content": fault.body} if isinstance(fault.body, bytes) else {"json": fault.body}
    return await client.post(CHAT, headers=fault.headers, **body)


class Load:
    """The requests of a round, and what the quiet server answers to them."""

    def __init__(self, server: Server, questions: Sequence[Question]) -> None:
        self.server, self.questions, self.faults = server, questions, faults()
        self.quiet: dict[Question, str] = {}
        self.client = httpx.AsyncClient(
            base_url=server.url, headers=server.headers, timeout=300, limits=httpx.Limits(max_connections=REQUESTS)
        )

    async def ask_alone(self) -> None:
        for question in self.questions:
            self.quiet[question] = await self._ask(question)

    async def round(self, seed: int) -> Round:
        """All requests at once."""
        done, rng = Round(), random.Random(seed)
        good = REQUESTS - CANCELLED - MALFORMED
        calls = [self._good(done, self.questions[i % len(self.questions)]) for i in range(good)]
        calls += [self._cancelled(done, rng.choice(self.questions), rng.randrange(1, 20)) for _ in range(CANCELLED)]
        calls += [self._malformed(done, self.faults[i % len(self.faults)]) for i in range(MALFORMED)]
        rng.shuffle(calls)
        begin = time.monotonic()
        await asyncio.gather(*calls)
        done.seconds = time.monotonic() - begin
        done.left = await self._left()
        done.mib = pss_mib(self.server.process.pid)
        return done

    async def _ask(self, question: Question) -> str:
        path, body = request(question)
        reply = await self.client.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return answer(reply.json())

    async def _good(self, done: Round, question: Question) -> None:
        same = await self._ask(question) == self.quiet[question]
        done.good += 1
        done.other_questions += bool(question.image) and not same
        done.other_stories += not question.image and not same

    async def _cancelled(self, done: Round, question: Question, after: int) -> None:
        """Reads so many events of a long answer, and closes the connection."""
        path, body = request(question, stream=True, ignore_eos=True, max_tokens=400)
        async with self.client.stream("POST", path, json=body) as reply:
            lines = reply.aiter_lines()
            for _ in range(after):
                await anext(lines)
        done.cancelled += 1

    async def _malformed(self, done: Round, fault: Fault) -> None:
        reply = await refusal(self.client, fault)
        status = str(reply.status_code)
        done.refused[status] = done.refused.get(status, 0) + 1
        if reply.status_code != fault.status or fault.says not in reply.text:
            done.unclear.append(f"{fault.name}: {reply.status_code} {reply.text[:200]}")

    async def _left(self) -> dict[str, float]:
        """What the server still holds, when it had time to let it go."""
        deadline = time.monotonic() + SETTLED
        while True:
            said = (await self.client.get("/metrics")).text.splitlines()
            found = {name: _metric(said, name) for name in METRICS}
            left = {name: value for name, value in found.items() if value}
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(0.2)


async def load(server: Server, questions: Sequence[Question], rounds: int) -> list[Round]:
    work = Load(server, questions)
    async with work.client:
        await work.ask_alone()
        return [await work.round(seed) for seed in range(rounds)]


def growth(rounds: Sequence[Round], warm_up: int) -> float:
    """MiB that the server holds more after the last round than after the `warm_up`-th."""
    return rounds[-1].mib - rounds[warm_up - 1].mib


def pss_mib(pid: int) -> float:
    """Memory of a process and its children, what they share counted once."""
    process = psutil.Process(pid)
    return sum(p.memory_full_info().pss for p in (process, *process.children(recursive=True))) / 2**20


def _metric(lines: Sequence[str], name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(given.checkpoint.resolve(), Path(folder)) as server:
        rounds = asyncio.run(load(server, prompts(), given.rounds))
        alive = server.process.poll() is None
    told = [asdict(one) for one in rounds]
    write_result(RESULT, {"checkpoint": given.checkpoint.name, "alive": alive, "rounds": told})


if __name__ == "__main__":
    main()
