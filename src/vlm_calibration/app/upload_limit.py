"""What stands in front of the web page: who may ask, how much may be sent, and where the browser may go from here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

POLICY = "; ".join(
    [
        # Gradio's pages are made of scripts and styles of their own, some of them written in the page.
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
    """An ASGI middleware for a server that is for this machine only.

    It answers requests for the names in `hosts` alone, so that no other site can have its name lead here; refuses bodies
    that are too large while they come in; and tells browsers to load nothing from anywhere else.

    Args:
        hosts: names that the server is called by, without a port.
        max_body: most bytes of a request.
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
        await self.app(scope, _limited(receive, self.max_body), _with_policy(send))


def _limited(receive: Receive, most: int) -> Receive:
    """Ends the connection where a body without a stated length goes on for too long."""
    taken = 0

    async def receiving() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        return message if taken <= most else {"type": "http.disconnect"}

    return receiving


def _with_policy(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            names = {name.lower() for name, _ in headers}
            # A stricter one of Gradio's, as files have, stays.
            added = [(name, value) for name, value in HEADERS if name not in names]
            message = {**message, "headers": [*headers, *added]}
        await send(message)

    return sending


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
