"""ASGI middleware that knows how many requests are running, and lets nobody new in when the server is to stop."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

REFUSAL = b'{"error": {"message": "this server is stopping; ask again", "type": "service_unavailable", "code": 503}}'
HEADERS = [(b"content-type", b"application/json"), (b"retry-after", b"1")]


class Traffic:
    """Counts the requests of one server, and refuses new ones when it is to stop."""

    def __init__(self) -> None:
        self.running = 0
        self.closed = False

    def around(self, app: Application) -> Application:
        """The application, counted; once closed, it answers 503 in the shape of OpenAI's errors."""

        async def counted(scope: Message, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and self.closed:
                await send({"type": "http.response.start", "status": 503, "headers": HEADERS})
                await send({"type": "http.response.body", "body": REFUSAL})
                return
            self.running += scope["type"] == "http"
            try:
                await app(scope, receive, send)
            finally:
                self.running -= scope["type"] == "http"

        return counted

    async def drain(self) -> None:
        """Closes, and returns when no request is running."""
        self.closed = True
        while self.running:
            await asyncio.sleep(0.1)
