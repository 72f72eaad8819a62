"""What of vLLM's server the world may reach: `vllm serve --middleware qe_dist.serve.http.vllm_gate.Gate`.

vLLM's API key guards paths below /v1 (and /v2, /inference, /cohere); /invocations, /tokenize, /generative_scoring and
others answer without it. Here they do not exist. A body is read only as far as the limit.
"""

from fastapi import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PROBES = frozenset({"/health", "/ping", "/version", "/metrics"})
"""Open without a key, as load balancers and Prometheus want them."""
BODY_BYTES = 64 * 2**20
"""Bytes of a request at most: several photographs in base64."""


class Gate:
    """ASGI middleware: 404 for what is neither below /v1/ nor a probe, 413 for a body over the limit."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not (path.startswith("/v1/") or path in PROBES):
            return await _refusal(404, f"no such path: {path}")(scope, receive, send)
        told = int(dict(scope["headers"]).get(b"content-length", 0))
        if told > BODY_BYTES:
            return await _refusal(413, f"{told} bytes; a request may have {BODY_BYTES}")(scope, receive, send)
        await self.app(scope, _Bounded(receive), send)


class _Bounded:
    """Receives a body that did not tell its length, up to the limit."""

    def __init__(self, receive: Receive) -> None:
        self.receive, self.left = receive, BODY_BYTES

    async def __call__(self) -> Message:
        message = await self.receive()
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise HTTPException(413, f"too long; a request may have {BODY_BYTES} bytes")
        return message


def _refusal(status: int, message: str) -> JSONResponse:
    """An answer in the shape of vLLM's own errors."""
    return JSONResponse({"error": {"message": message, "code": status}}, status_code=status)
