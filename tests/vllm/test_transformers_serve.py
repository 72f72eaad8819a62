"""`transformers serve` of a checkpoint: real HTTP, text and images, several requests at a time."""

import base64
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from qe_dist.serve.loading import load_model
from tests.vllm.questions import DATA, ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.nightly]

COMMAND = "python -m qe_dist.serve.hf serve CHECKPOINT --host 127.0.0.1 --port 8000"
QUESTIONS, STORIES, TOKENS = 12, 4, 24


@pytest.fixture(scope="module")
def checkpoint(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["qe-extract-w4a8"]


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[str]:
    """Its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert COMMAND in (ROOT / "docs" / "guides" / "serving.md").read_text()
    words = COMMAND.replace("CHECKPOINT", str(checkpoint)).replace("8000", str(port)).split()[3:]
    run = [sys.executable, "-m", "tests.vllm.transformers_serve", *words, "--dtype", "float32"]
    process = subprocess.Popen(run, cwd=ROOT)
    try:
        yield wait_for(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        process.wait(30)


def wait_for(address: str, process: subprocess.Popen[bytes]) -> str:
    for _ in range(240):
        assert process.poll() is None, "the server has ended"
        try:
            httpx.get(f"{address}/health").raise_for_status()
            return address
        except httpx.ConnectError:
            time.sleep(0.5)
    raise TimeoutError(address)


def messages(row: dict[str, Any], image: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A chat that asks what a line of the evaluation set asks."""
    content = [image, {"type": "text", "text": row["prompt"]}] if image else row["text"][: len(row["text"]) // 2]
    return [{"role": "user", "content": content}]


def rows() -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (DATA / "evaluation.jsonl").read_text().splitlines()]
    return [r for r in lines if "image" in r][:QUESTIONS] + [r for r in lines if "text" in r][:STORIES]


def over_http(address: str, checkpoint: Path, row: dict[str, Any]) -> str:
    image = None
    if "image" in row:
        data = base64.b64encode((DATA / row["image"]).read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    asked = {"model": str(checkpoint), "messages": messages(row, image), "max_tokens": TOKENS, "temperature": 0}
    answer = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=300)
    answer.raise_for_status()
    return answer.json()["choices"][0]["message"]["content"].strip()


def in_process(model: Any, processor: Any, row: dict[str, Any]) -> str:
    image = {"type": "image", "image": Image.open(DATA / row["image"]).convert("RGB")} if "image" in row else None
    inputs = processor.apply_chat_template(
        messages(row, image), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_it_answers_over_http_as_in_process(server: str, checkpoint: Path) -> None:
    from transformers import AutoProcessor

    asked = rows()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda row: over_http(server, checkpoint, row), asked))
    model, processor = load_model(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    assert found == [in_process(model, processor, row) for row in asked]
    right = [said == row["answer"] for said, row in zip(found, asked, strict=False) if "answer" in row]
    assert sum(right) > QUESTIONS / 2
