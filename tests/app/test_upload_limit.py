"""The middleware in front of the page: host names, body sizes and headers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vlm_calibration.app.upload_limit import POLICY, Guard

MOST = 1000


class Inner:
    """An application that reads the whole request and answers with a policy of its own, or without one."""

    def __init__(self, *headers: tuple[bytes, bytes]) -> None:
        self.headers = list(headers)
        self.read: bytes | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message.get("more_body"):
                self.read = body
                break
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        await send({"type": "http.response.body", "body": b"inside"})


def _call(inner: Inner, *parts: bytes, **headers: str) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of the answer to a request whose body arrives in parts."""
    given = {"host": "127.0.0.1:7860", **headers}
    scope = {
        "type": "http",
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in given.items()],
    }
    coming = [
        {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)}
        for i, part in enumerate(parts or (b"",))
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return coming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(inner, ("127.0.0.1", "localhost"), MOST)(scope, receive, send))
    start, body = sent
    return start["status"], dict(start["headers"]), body["body"]


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "localhost"])
def test_its_own_names_are_answered(host: str) -> None:
    assert _call(Inner(), host=host)[::2] == (200, b"inside")


@pytest.mark.parametrize("host", ["elsewhere.example", "127.0.0.1.elsewhere.example:7860", "", "[::1]:7860"])
def test_other_names_are_not(host: str) -> None:
    inner = Inner()
    status, _, body = _call(inner, b"secret", host=host)
    assert (status, body) == (421, b"This server answers only to 127.0.0.1 and localhost.")
    assert inner.read is None


@pytest.mark.parametrize("length", [str(MOST + 1), "-1", "many"])
def test_a_length_that_is_too_large_is_refused_unread(length: str) -> None:
    inner = Inner()
    assert _call(inner, b"x", content_length=length)[0] == 413
    assert inner.read is None


def test_as_much_as_is_allowed_is_read() -> None:
    inner = Inner()
    assert _call(inner, b"x" * 400, b"x" * 600, content_length=str(MOST))[0] == 200
    assert inner.read == b"x" * MOST


def test_a_body_that_goes_on_is_cut_off() -> None:
    inner = Inner()
    _call(inner, b"x" * 400, b"x" * 600, b"x")
    assert inner.read is None, "it never got the whole"


def test_browsers_are_told_to_load_nothing_from_elsewhere() -> None:
    _, headers, _ = _call(Inner())
    assert headers[b"content-security-policy"] == POLICY.encode()
    assert "http" not in POLICY
    assert headers[b"x-content-type-options"] == b"nosniff"


def test_a_policy_that_is_there_stays() -> None:
    _, headers, _ = _call(Inner((b"Content-Security-Policy", b"sandbox")))
    assert headers[b"Content-Security-Policy"] == b"sandbox"
    assert b"content-security-policy" not in headers
