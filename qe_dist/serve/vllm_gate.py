"""ASGI middleware before vLLM's application: which paths there are, how much a request may say, and nobody new while a
replica stops. vLLM loads it by its name (`--middleware`) and without arguments."""

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY = "QE_DIST_MAX_BODY"
"""Environment variable: bytes of one request."""
GUARDED = "/v1/"
OPEN = ("/health", "/ping", "/metrics", "/version")
"""vLLM asks for the key under a few prefixes only. All other paths, some of which answer just as well, are closed."""


@dataclass
class Traffic:
    """Of this process."""

    running: int = 0
    closed: bool = False


traffic = Traffic()


class Gate:
    """Refuses with an error as OpenAI's: 404 for closed paths, 413 for too large a body, 503 while stopping."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.max_body = int(os.environ.get(MAX_BODY, 64 * 2**20))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http" or not (scope["path"].startswith(GUARDED) or scope["path"] in OPEN):
            await _refuse(send, 404, f"there is no {scope['path']} here")
        elif traffic.closed:
            await _refuse(send, 503, "this server is stopping; ask again")
        else:
            await self._let_in(scope, receive, send)

    async def _let_in(self, scope: Message, receive: Receive, send: Send) -> None:
        traffic.running += 1
        try:
            if (body := await self._read(receive)) is None:
                await _refuse(send, 413, f"the request has more than {self.max_body} bytes")
            else:
                await self.app(scope, _replay(body, receive), send)
        finally:
            traffic.running -= 1

    async def _read(self, receive: Receive) -> list[Message] | None:
        """The messages of the whole body; None where it is too large, whatever its header says."""
        messages, size, more = [], 0, True
        while more:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self.max_body:
                return None
            more = message.get("more_body", False)
        return messages


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """These messages, then what comes, which is the end of the connection."""
    kept = iter(messages)

    async def next_message() -> Message:
        return next(kept, None) or await receive()

    return next_message


async def _refuse(send: Send, status: int, message: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": status}
    retry = [(b"retry-after", b"1")] if status == 503 else []
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"application/json"), *retry],
        }
    )
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
