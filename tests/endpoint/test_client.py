"""Requests to a server that answers by a script: faults, limits, the key, and what is kept."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vlm_calibration.endpoint.client import Client, RefusedError, greedy, listing_tokens
from vlm_calibration.endpoint.responses import ResponseLog
from vlm_calibration.endpoint.settings import Endpoint
from vlm_calibration.records import DataError

KEY = "sk-secret-7f3a9c"
BODY = greedy([{"type": "text", "text": "Hello"}], 4)
Reply = Callable[[int, dict[str, Any]], Response]


def answer(text: str | None = "Yes.", **changes: Any) -> JSONResponse:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": None}
    content = {"model": "m-2026", "choices": [choice], "usage": {"completion_tokens": 2, "total_tokens": 9}}
    return JSONResponse({**content, **changes})


class Script:
    """Answers the n-th request, from 0, by a function of n and its body.

    Attributes:
        times: when each request came.
        headers: of each request.
    """

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []

    async def chat(self, request: Request) -> Response:
        number = len(self.times)
        self.times.append(time.monotonic())
        self.headers.append(dict(request.headers))
        reply = self.reply(number, json.loads(await request.body()))
        return await reply if asyncio.iscoroutine(reply) else reply


@contextmanager
def scripted(reply: Reply, port: int = 0) -> Iterator[tuple[str, Script]]:
    script = Script(reply)
    app = Starlette(routes=[Route("/v1/chat/completions", script.chat, methods=["POST"])])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
        port = probe.getsockname()[1]
    runner = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{port}/v1", script
    runner.should_exit = runner.force_exit = True
    thread.join(10)


def client(url: str, **settings: Any) -> Client:
    return Client(Endpoint(url, **{"model": "m", "backoff": 0.01, "retries": 2, **settings}), "served")


def ask(asking: Client, *bodies: dict[str, Any]) -> list[str]:
    """The texts of the responses, all asked at the same time."""
    try:
        return [r.text for r in asking.run([asking.ask(body) for body in bodies or (BODY,)])]
    finally:
        asking.close()


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_rate_limit_is_waited_for_by_all_requests(form: str) -> None:
    from datetime import UTC, datetime, timedelta
    from email.utils import format_datetime

    def reply(n: int, body: dict[str, Any]) -> Response:
        later = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        wait = "0.5" if form == "seconds" else later
        return JSONResponse({}, 429, headers={"Retry-After": wait}) if n == 0 else answer()

    least = 0.5 if form == "seconds" else 0.9
    with scripted(reply) as (url, script):
        bodies = [greedy([{"type": "text", "text": str(n)}], 4) for n in range(3)]
        assert ask(client(url, concurrency=1), *bodies) == ["Yes."] * 3
        first, *others = script.times
        assert min(others) - first >= least
        assert len(script.times) == 4


def test_a_limit_that_lets_others_pass_is_no_failure() -> None:
    """One request meets the limit five times, with two retries, while others are answered between."""

    def reply(n: int, body: dict[str, Any]) -> Response:
        limited = "limited" in json.dumps(body) and n < 10
        return JSONResponse({}, 429, headers={"Retry-After": "0.01"}) if limited else answer()

    with scripted(reply) as (url, _):
        bodies = [greedy([{"type": "text", "text": t}], 4) for t in ("limited", *map(str, range(8)))]
        assert ask(client(url, concurrency=2), *bodies) == ["Yes."] * 9


def test_requests_in_flight_are_bounded() -> None:
    busy: list[int] = [0, 0]

    async def counted() -> Response:
        busy[0] += 1
        busy[1] = max(busy)
        await asyncio.sleep(0.05)
        busy[0] -= 1
        return answer()

    with scripted(lambda n, b: counted()) as (url, _):  # type: ignore[arg-type,return-value]
        ask(client(url, concurrency=3), *(greedy([{"type": "text", "text": str(n)}], 4) for n in range(12)))
    assert busy == [0, 3]


def test_waits_grow_and_end() -> None:
    with scripted(lambda n, body: JSONResponse({"error": "boom"}, 503)) as (url, script):
        with pytest.raises(DataError, match=r"status 503: boom; gave up after 4 attempts"):
            ask(client(url, retries=3, backoff=0.2))
        waits = [b - a for a, b in zip(script.times, script.times[1:], strict=False)]
        assert len(waits) == 3
        for wait, least in zip(waits, (0.1, 0.2, 0.4), strict=True):
            assert least <= wait < 3 * least + 1.0


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (lambda n, b: Response("<html>", media_type="text/html"), "something other than JSON"),
        (lambda n, b: JSONResponse([]), "something other than a chat completion"),
        (lambda n, b: JSONResponse({"choices": []}), "something other than a chat completion"),
        (lambda n, b: answer(None), "answers without a text (finish_reason 'stop')"),
        (lambda n, b: answer(model="other"), "answers with the model 'other' instead of 'm'"),
        (lambda n, b: Response(b"{", headers={"Content-Length": "99"}), "breaks off"),
        (lambda n, b: JSONResponse({}, 500), "status 500"),
        (lambda n, b: JSONResponse({"detail": "too large"}, 413), "status 413: too large"),
        (
            lambda n, b: JSONResponse({"error": {"message": "pay", "code": "insufficient_quota"}}, 429),
            "status 429: pay",
        ),
    ],
)  # fmt: skip
def test_nonsense_is_one_line(reply: Reply, says: str) -> None:
    with scripted(reply) as (url, _), pytest.raises(DataError) as caught:
        ask(client(url, retries=1))
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"served ('m' at {url}): ")
    assert "\n" not in str(caught.value)


def test_a_fault_is_forgotten_after_the_next_attempt() -> None:
    replies = [Response("<html>"), answer(None), answer(model="other"), JSONResponse({}, 500)]

    def reply(n: int, body: dict[str, Any]) -> Response:
        return replies[n] if n < len(replies) else answer()

    with scripted(reply) as (url, script):
        assert ask(client(url, retries=4)) == ["Yes."]
        assert len(script.times) == 5


def test_an_answer_that_is_cut_off_before_its_text_is_empty() -> None:
    choice = {"message": {"content": None}, "finish_reason": "content_filter"}
    with scripted(lambda n, b: answer(choices=[choice])) as (url, _):
        assert ask(client(url)) == [""]


def test_a_server_that_starts_late_is_waited_for() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asking = client(f"http://127.0.0.1:{port}/v1", retries=20, backoff=0.1)
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.extend(ask(asking)))
    thread.start()
    time.sleep(0.4)
    assert not texts
    with scripted(lambda n, b: answer(), port):
        thread.join(30)
    assert texts == ["Yes."]


def test_no_server_is_one_line() -> None:
    with pytest.raises(DataError, match=r"served \('m' at http://127.0.0.1:9/v1\): cannot be reached"):
        ask(client("http://127.0.0.1:9/v1", retries=0))


def test_a_timeout() -> None:
    async def late() -> Response:
        await asyncio.sleep(1)
        return answer()

    with scripted(lambda n, b: late() if n == 0 else answer()) as (url, script):  # type: ignore[arg-type,return-value]
        assert ask(client(url, timeout=0.3)) == ["Yes."]
        assert len(script.times) == 2


def test_the_same_request_is_sent_once(tmp_path: Path) -> None:
    with scripted(lambda n, b: answer(str(n))) as (url, script):
        asking = client(url)
        asking.log = ResponseLog(tmp_path / "log.jsonl")
        assert [r.text for r in asking.run([asking.ask(BODY) for _ in range(3)])] == ["0"] * 3
        assert ask(asking) == ["0"], "asked before in this run"
        again = client(url)
        again.log = ResponseLog(tmp_path / "log.jsonl")
        assert ask(again) == ["0"], "asked before in another run"
        other = Client(again.endpoint, "other")
        other.log = ResponseLog(tmp_path / "log.jsonl")
        assert ask(other) == ["1"], "another system"
        assert len(script.times) == 2
        assert again.used == 9


def test_the_key_goes_to_the_server_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)

    def reply(n: int, body: dict[str, Any]) -> Response:
        return answer() if n == 0 else JSONResponse({"error": {"message": f"Bad key: Bearer {KEY}"}}, 401)

    with scripted(reply) as (url, script):
        asking = client(url, key_variable="MY_KEY")
        asking.log = ResponseLog(tmp_path / "log.jsonl")
        assert ask(asking) == ["Yes."]
        with pytest.raises(RefusedError) as caught:
            ask(client(url, key_variable="MY_KEY"))
        assert script.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "Bad key: Bearer ***" in str(caught.value)
    assert "MY_KEY holds the key that was sent" in str(caught.value)
    shown = str(caught.value) + caplog.text + "".join(capfd.readouterr()) + repr(asking.endpoint)
    assert KEY not in shown + (tmp_path / "log.jsonl").read_text()


def test_a_named_variable_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(DataError, match="the environment variable MY_KEY is not set"):
        client("http://h/v1", key_variable="MY_KEY")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"url": "${url}"}, "--url is not given"),
        ({"model": "${served_model}"}, "--served-model is not given"),
        ({"url": "localhost:8000"}, "expected an address such as"),
        (
            {"url": f"http://user:{KEY}@h/v1"},
            "--url h/v1: the address may hold neither a user nor parameters",
        ),
        ({"url": f"http://h/v1?key={KEY}"}, "--url http://h/v1: the address may hold neither"),
        ({"concurrency": 0}, "endpoint.concurrency must be at least 1, found 0"),
        ({"timeout": 0.0}, "endpoint.timeout must be a number of seconds above 0"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        Endpoint(**{"url": "http://h/v1", "model": "m", **settings})
    assert says in str(caught.value)
    assert KEY not in str(caught.value)


def test_parameters_change_the_body() -> None:
    bodies: list[dict[str, Any]] = []

    def reply(n: int, body: dict[str, Any]) -> Response:
        bodies.append(body)
        return answer()

    with scripted(reply) as (url, _):
        ask(client(url, parameters={"temperature": None, "max_tokens": None, "max_completion_tokens": 9}))
    assert bodies == [{"model": "m", "messages": BODY["messages"], "max_completion_tokens": 9}]


def test_after_a_failure_nothing_more_is_sent_and_what_arrives_is_kept(tmp_path: Path) -> None:
    async def slow() -> Response:
        await asyncio.sleep(0.5)
        return answer("late")

    def reply(n: int, body: dict[str, Any]) -> Any:
        return JSONResponse({}, 400) if "bad" in json.dumps(body) else slow()

    with scripted(reply) as (url, script):
        asking = client(url, concurrency=2)
        asking.log = ResponseLog(tmp_path / "log.jsonl")
        bodies = [greedy([{"type": "text", "text": t}], 4) for t in ("good", "bad", "third", "fourth")]
        with pytest.raises(DataError, match="status 400"):
            ask(asking, *bodies)
        assert len(script.times) == 2
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["late"]


def test_tokens_survive_the_log(tmp_path: Path) -> None:
    top = [
        {"token": "Ja", "bytes": [74, 97], "logprob": -0.5},
        {"token": "\ufffd", "bytes": [195], "logprob": -2.0},
    ]
    entry = {"token": "Ja", "bytes": [74, 97], "logprob": -0.5, "top_logprobs": top}
    choice = {"message": {"content": "Ja"}, "finish_reason": "stop", "logprobs": {"content": [entry]}}
    with scripted(lambda n, b: answer(choices=[choice])) as (url, script):
        found = []
        for _ in range(2):
            asking = client(url)
            asking.log = ResponseLog(tmp_path / "log.jsonl")
            found += asking.run([asking.ask(listing_tokens(BODY))])
            asking.close()
        assert len(script.times) == 1
    assert found[0] == found[1]
    assert found[0].tokens[0].alternatives == {b"Ja": -0.5, b"\xc3": -2.0}


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"request": "x"}\n{"request": 3\n')
    log = ResponseLog(tmp_path / "log.jsonl")
    with pytest.raises(
        DataError, match=r"log.jsonl:2: damaged: .*: remove it, and its requests are sent again"
    ):
        log.find("x")
