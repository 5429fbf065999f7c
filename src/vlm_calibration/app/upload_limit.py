"""The middleware in front of the web page: allowed host names, a limit on request bodies, and security headers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

POLICY = "; ".join(
    [
        # Gradio's pages use inline scripts and styles.
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    ]
)

HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """ASGI middleware for a server that only this machine may use.

    It answers only requests whose host is in `hosts`, against DNS rebinding; refuses bodies that are too large while they
    arrive; and adds headers that forbid browsers to load anything from elsewhere.

    Args:
        app: the ASGI application.
        hosts: allowed host names, without a port.
        max_body: largest request body in bytes.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...], max_body: int) -> None:
        self.app = app
        self.hosts = hosts
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0] not in self.hosts:
            await _refuse(send, 421, "This server answers only to 127.0.0.1 and localhost.")
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body:
            await _refuse(send, 413, f"More than {self.max_body >> 20} MB.")
            return
        await self.app(scope, _limited(receive, self.max_body), _with_headers(send))


def _limited(receive: Receive, max_body: int) -> Receive:
    """End the connection if a body of unknown length becomes too large."""
    received = 0

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        return message if received <= max_body else {"type": "http.disconnect"}

    return receive_limited


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            names = {name.lower() for name, _ in headers}
            # Keep stricter headers of Gradio, such as those of files.
            added = [(name, value) for name, value in HEADERS if name not in names]
            message = {**message, "headers": [*headers, *added]}
        await send(message)

    return send_with_headers


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
