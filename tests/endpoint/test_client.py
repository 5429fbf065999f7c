"""Requests to a server that answers by a script: faults, the key, and settings."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vlm_calibration.endpoint.client import Client, Endpoint, RefusedError
from vlm_calibration.records import DataError

from .demo_server import serving

KEY = "sk-secret-7f3a9c"
MESSAGES = [{"role": "user", "content": "Hello"}]
Reply = Callable[[int], Any]


def answer(text: str | None = "Yes.", **changes: Any) -> JSONResponse:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": None}
    content = {"model": "m-2026", "choices": [choice], "usage": {"completion_tokens": 2, "total_tokens": 9}}
    return JSONResponse({**content, **changes})


class Script:
    """Answers the n-th request, from 0, by a function of n.

    Attributes:
        bodies: of each request.
        headers: of each request.
    """

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])

    async def chat(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        self.bodies.append(json.loads(await request.body()))
        reply = self.reply(len(self.bodies) - 1)
        return await reply if asyncio.iscoroutine(reply) else reply


@contextmanager
def scripted(reply: Reply) -> Iterator[tuple[str, Script]]:
    script = Script(reply)
    with serving(script) as url:
        yield url, script


def ask(url: str, **settings: Any) -> str:
    client = Client(Endpoint(url, **{"model": "m", "retries": 1, **settings}), "served")
    try:
        return client.ask(MESSAGES, 4).text
    finally:
        client.close()


def _json(content: Any, status: int = 200) -> Reply:
    return lambda n: JSONResponse(content, status)


NO_COMPLETION = "something other than a chat completion"


@pytest.mark.parametrize(
    ("reply", "says", "requests"),
    [
        (lambda n: Response("{", media_type="application/json"), "something other than JSON", 1),
        (lambda n: Response("<html>"), NO_COMPLETION, 1),
        (_json({"choices": []}), NO_COMPLETION, 1),
        (lambda n: Response(b"{", headers={"Content-Length": "99"}), "breaks off", 2),
        (_json({"error": "boom"}, 500), "500", 2),
        (_json({"detail": "too large"}, 413), "too large", 1),
        (_json({}, 400), "status 400", 1),
        (_json({}, 422), "status 422", 1),
    ],
)
def test_a_request_that_fails_is_one_line(reply: Reply, says: str, requests: int) -> None:
    with scripted(reply) as (url, script), pytest.raises(DataError) as caught:
        ask(url)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"served ('m' at {url}): ")
    assert "\n" not in str(caught.value)
    assert len(script.bodies) == requests
    assert isinstance(caught.value, RefusedError) == (says in ("status 400", "status 422"))


def test_a_rate_limit_and_a_timeout_are_waited_for() -> None:
    async def late() -> Response:
        await asyncio.sleep(1)
        return answer()

    limit = JSONResponse({}, 429, headers={"Retry-After": "0.3"})
    with scripted(lambda n: late() if n == 1 else (limit, None, answer())[n]) as (url, script):
        began = time.monotonic()
        assert ask(url, timeout=0.3, retries=2) == "Yes."
        assert time.monotonic() - began >= 0.6
        assert len(script.bodies) == 3
    with pytest.raises(DataError, match=rf"served \('m' at {url}\): cannot be reached"):
        ask(url)


def test_the_key_goes_to_the_server_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)
    bad = JSONResponse({"error": {"message": f"Bad key: Bearer {KEY}"}}, 401)
    with scripted(lambda n: bad if n else answer()) as (url, script):
        assert ask(url, key_variable="MY_KEY") == "Yes."
        with pytest.raises(DataError) as caught:
            ask(url, key_variable="MY_KEY")
        with pytest.raises(DataError, match="OTHER_KEY is not set"):
            ask(url, key_variable="OTHER_KEY")
        assert script.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "Bad key: Bearer ***" in str(caught.value)
    assert "MY_KEY holds the key that was sent" in str(caught.value)
    assert caught.value.__suppress_context__
    assert KEY not in str(caught.value) + caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"url": "${url}"}, "--url is not given"),
        ({"model": "${served_model}"}, "--served-model is not given"),
        ({"url": "localhost:8000"}, "expected an address such as"),
        ({"url": f"http://user:{KEY}@h/v1"}, "--url h/v1: the address may hold neither"),
        ({"url": f"http://h/v1?key={KEY}"}, "--url http://h/v1: the address may hold neither"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        Endpoint(**{"url": "http://h/v1", "model": "m", **settings})
    assert says in str(caught.value)
    assert KEY not in str(caught.value)


def test_parameters_change_the_body() -> None:
    with scripted(lambda n: answer(None)) as (url, script):
        given = {"temperature": None, "max_tokens": None, "max_completion_tokens": 9}
        assert ask(url, parameters=given) == "", "an answer without a text is empty"
    assert script.bodies == [{"model": "m", "messages": MESSAGES, "max_completion_tokens": 9}]


def test_tokens_keep_their_bytes() -> None:
    listed = (("Ja", [74, 97], -0.5), ("\ufffd", [195], -2.0))
    top = [{"token": text, "bytes": given, "logprob": value} for text, given, value in listed]
    entry = {"token": "Ja", "bytes": None, "logprob": -0.5, "top_logprobs": top}
    choice = {"message": {"content": "Ja"}, "finish_reason": "stop", "logprobs": {"content": [entry]}}
    with scripted(lambda n: answer(choices=[choice])) as (url, script):
        client = Client(Endpoint(url, "m"), "served")
        [token] = client.ask(MESSAGES, 4, logprobs=True).tokens
        client.close()
        assert script.bodies[0]["logprobs"] is True
    assert token.alternatives == {b"Ja": -0.5, b"\xc3": -2.0}
    assert client.used == 9
