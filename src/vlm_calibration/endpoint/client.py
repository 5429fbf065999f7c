"""Sends requests to an endpoint: bounded in number, repeated after faults, and never twice after a response."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import Any, TypeVar

from vlm_calibration.endpoint.responses import NonsenseError, Response, ResponseLog, Token, read_response
from vlm_calibration.endpoint.settings import UNKEYED, Endpoint
from vlm_calibration.records import DataError
from vlm_calibration.settings import digest

T = TypeVar("T")

LONGEST_BACKOFF = 60.0
"""Seconds before a retry, at most, if the server names no time."""
REFUSED = frozenset({400, 401, 403, 404, 405, 413, 415, 422})
"""Statuses that mean the same at the next attempt."""
SHOWN = 300
"""Number of characters of a server's message in an error."""
TOP = 20
"""Number of tokens that a server lists at each position, the most that OpenAI and vLLM allow by default."""
SAME_P = 0.1
"""Largest difference between the probabilities of a token in an answer and in its continuation."""
PROBE_TOKENS = 16
"""Length limit of the answer to the first request, which shows what a server can do."""
PROBE_ATTEMPTS = 5
"""Requests without log-probabilities in the response after which a server counts as one that gives none."""


def greedy(content: Sequence[Mapping[str, Any]], max_tokens: int) -> dict[str, Any]:
    """The request for the likeliest answer to a message of these parts."""
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": max_tokens, "temperature": 0}


def listing_tokens(body: Mapping[str, Any]) -> dict[str, Any]:
    """The request with a list of the likeliest tokens at each position of the response."""
    return {**body, "logprobs": True, "top_logprobs": TOP}


def continued(content: Sequence[Mapping[str, Any]], beginning: str) -> dict[str, Any]:
    """The request for the token after the beginning of an answer, as vLLM and SGLang understand it."""
    body = listing_tokens(greedy(content, 1))
    body["messages"] = [*body["messages"], {"role": "assistant", "content": beginning.lstrip()}]
    return {**body, "continue_final_message": True, "add_generation_prompt": False}


class RefusedError(DataError):
    """The server refuses a request, whenever it is sent."""


class _FaultError(Exception):
    """A failed attempt that may succeed next time.

    Attributes:
        wait: seconds until then, if the server names them.
        is_limit: whether it is a rate limit, which is not about this request.
    """

    def __init__(self, message: str, wait: float | None = None, is_limit: bool = False) -> None:
        super().__init__(message)
        self.wait = wait
        self.is_limit = is_limit


class _StoppedError(Exception):
    """Another request has failed for good."""


class Client:
    """Sends requests to one endpoint from one thread at a time.

    Args:
        endpoint: the endpoint.
        name: of the system, for messages; the same request of another system is another request.

    Attributes:
        log: responses of this and of earlier runs; None: they are kept in memory.
        sent: number of requests that were sent.
        used: number of tokens that the server has counted for the responses, those from the log included.
        gives_tokens: whether the server gives log-probabilities; set by `connect`.
        continues: whether it continues a given answer; set by `connect`.

    Raises:
        DataError: the client library is not installed, or the key is not set.
    """

    def __init__(self, endpoint: Endpoint, name: str) -> None:
        if find_spec("openai") is None:
            raise DataError("an endpoint needs the package openai: pip install 'vlm-calibration[endpoint]'")
        self.endpoint = endpoint
        self.name = name
        self.log: ResponseLog | None = None
        self.sent = 0
        self.used = 0
        self.gives_tokens = False
        self.continues = False
        self._key = endpoint.key()
        self._answered: dict[str, Response] = {}
        self._succeeded = 0
        self._pending: dict[str, asyncio.Future[Response]] = {}
        self._paused_until = 0.0
        self._jitter = random.Random()
        self._runner: asyncio.Runner | None = None
        self._api: Any = None

    # --- Running ----------------------------------------------------------------------------------------------------

    def run(self, work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """The results of coroutines that run at the same time and `ask`.

        After a failure no request is sent any more; those in flight end first, so that their responses are in the log.

        Raises:
            DataError: a request failed for good.
        """
        if self._runner is None:
            from openai import AsyncOpenAI

            self._runner = asyncio.Runner()
            self._api = AsyncOpenAI(
                base_url=self.endpoint.url,
                api_key=self._key,
                timeout=self.endpoint.timeout,
                max_retries=0,
            )
        return self._runner.run(self._run(work))

    async def _run(self, work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        self._slots = asyncio.Semaphore(self.endpoint.concurrency)
        self._stop = asyncio.Event()
        results = await asyncio.gather(*work, return_exceptions=True)
        failures = [r for r in results if isinstance(r, BaseException)]
        for failure in sorted(failures, key=lambda f: isinstance(f, _StoppedError)):
            raise failure
        return results  # type: ignore[return-value]

    def close(self) -> None:
        """Close the connections and the log."""
        if self._runner is not None:
            self._runner.run(self._api.close())
            self._runner.close()
            self._runner = None
        if self.log is not None:
            self.log.close()

    def connect(self, *, with_tokens: bool) -> None:
        """Find out with a few small requests whether the server knows model and key, and what it can do.

        Args:
            with_tokens: whether log-probabilities are needed, and continuations of a given answer.

        Raises:
            DataError: the server cannot be reached, or refuses to answer.
        """
        content = [{"type": "text", "text": "Count from one to five."}]
        plain = greedy(content, PROBE_TOKENS)
        body = listing_tokens(plain) if with_tokens else plain
        for attempt in range(PROBE_ATTEMPTS):
            # A response may lack them by a fault, so a server without them is asked several times, each a request of its own.
            number = {"seed": attempt} if attempt else {}
            [response] = self.run([self.ask({**body, **number})])
            if response.tokens is not None or not with_tokens:
                break
        self.gives_tokens = with_tokens and response.tokens is not None
        if self.gives_tokens:
            [self.continues] = self.run([self._continues(content, response.tokens or ())])

    async def _continues(self, content: Sequence[Mapping[str, Any]], tokens: Sequence[Token]) -> bool:
        """Whether the server continues a given answer: after the beginning of one that it gave, the same token must be as likely."""
        if len(tokens) < 2:
            return False
        beginning, following = tokens[0].text.decode("utf-8", "replace"), tokens[1]
        try:
            response = await self.ask(continued(content, beginning), may_be_refused=True)
        except RefusedError:
            return False
        listed = response.tokens[0].alternatives if response.tokens else {}
        p = math.exp(listed.get(following.text, -math.inf))
        return abs(p - math.exp(following.log_p)) < SAME_P

    # --- One request ------------------------------------------------------------------------------------------------

    async def ask(self, body: Mapping[str, Any], *, may_be_refused: bool = False) -> Response:
        """The response to a request, from the log if it was answered before.

        Args:
            body: without the model and the endpoint's further parameters.
            may_be_refused: go on with other requests if the server refuses this one.

        Raises:
            RefusedError: the server refuses it.
            DataError: it failed for good.
        """
        merged = {"model": self.endpoint.model, **body, **self.endpoint.parameters}
        body = {key: value for key, value in merged.items() if value is not None}
        key = digest([self.name, "\n", json.dumps(body, sort_keys=True)])
        if key in self._pending:
            return await asyncio.shield(self._pending[key])
        found = self._answered.get(key) if self.log is None else self.log.find(key)
        if found is None:
            future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
            self._pending[key] = future
            try:
                found = await self._send_until_answered(body)
                self._keep(key, found)
                future.set_result(found)
            except BaseException as error:
                if not (may_be_refused and isinstance(error, RefusedError)):
                    self._stop.set()
                future.set_exception(error if isinstance(error, Exception) else _StoppedError())
                future.exception()  # marked as seen: mostly nobody else waits
                raise
            finally:
                del self._pending[key]
        self.used += found.used
        return found

    def _keep(self, key: str, response: Response) -> None:
        if self.log is not None:
            self.log.add(key, response)
        else:
            self._answered[key] = response

    async def _send_until_answered(self, body: dict[str, Any]) -> Response:
        failures = 0
        while True:
            before = self._succeeded
            try:
                async with self._slots:
                    await self._wait_for_limit()
                    response = await self._send(body)
            except _FaultError as fault:
                # A limit that lets other requests pass is no fault of this one.
                failures += not (fault.is_limit and self._succeeded > before)
                if failures > self.endpoint.retries:
                    raise DataError(self._about(f"{fault}; gave up after {failures} attempts")) from fault
                await self._sleep(self._delay(failures, fault))
            else:
                self._succeeded += 1
                return response

    def _delay(self, failures: int, fault: _FaultError) -> float:
        if fault.wait is not None:
            self._paused_until = max(self._paused_until, time.monotonic() + fault.wait)
            # Not all at the same moment.
            return fault.wait + self._jitter.uniform(0, min(1.0, self.endpoint.backoff))
        longest = min(LONGEST_BACKOFF, self.endpoint.backoff * 2 ** max(0, failures - 1))
        return longest * self._jitter.uniform(0.5, 1.5)

    async def _wait_for_limit(self) -> None:
        """Wait until the time that the server named for all requests."""
        while (left := self._paused_until - time.monotonic()) > 0:
            await self._sleep(left)

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return

    async def _send(self, body: dict[str, Any]) -> Response:
        """One attempt."""
        import openai

        if self._stop.is_set():
            raise _StoppedError
        limit = self.endpoint.max_requests
        if limit is not None and self.sent >= limit:
            raise DataError(
                self._about(
                    f"max_requests: {limit} requests were sent: raise it, and resume to go on from here"
                )
            )
        self.sent += 1
        known = {key: body[key] for key in ("model", "messages")}
        rest = {key: value for key, value in body.items() if key not in known}
        try:
            raw = await self._api.chat.completions.with_raw_response.create(**known, extra_body=rest)
            content = json.loads(raw.http_response.content)
            reports_as = self.endpoint.reports_as or self.endpoint.model
            return read_response(
                content, reports_as, with_tokens=self.gives_tokens and bool(body.get("logprobs"))
            )
        except openai.APITimeoutError as error:
            raise _FaultError(f"no response within {self.endpoint.timeout:g} s") from error
        except openai.APIConnectionError as error:
            cause = error.__cause__
            reason = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
            raise _FaultError(f"cannot be reached, or breaks off ({self._said(reason)})") from error
        except openai.APIStatusError as error:
            raise self._of_status(error.status_code, error.response, error.body) from error
        except (ValueError, openai.APIResponseValidationError) as error:
            raise _FaultError(f"answers with something other than JSON ({self._said(str(error))})") from error
        except NonsenseError as error:
            raise _FaultError(self._said(str(error))) from error

    def _of_status(self, status: int, response: Any, body: Any) -> Exception:
        said = f"status {status}: {self._said(_message(body) or response.text)}"
        if status in REFUSED or (status == 429 and "insufficient_quota" in str(body)):
            if status in (401, 403):
                variable = self.endpoint.key_variable
                state = "is not set" if self._key == UNKEYED else "holds the key that was sent"
                said += f" (the environment variable {variable} {state})"
            return RefusedError(self._about(said))
        return _FaultError(said, _retry_after(response.headers), is_limit=status == 429)

    def _about(self, message: str) -> str:
        return f"{self.name} ({self.endpoint.model!r} at {self.endpoint.url}): {message}"

    def _said(self, text: str) -> str:
        """A server's message in one line, without the key, which some servers repeat."""
        words = " ".join(text.split())
        if self._key != UNKEYED:
            words = words.replace(self._key, "***")
        return words[:SHOWN]


def _message(body: Any) -> str:
    """The message in the body of an error; empty without one."""
    while isinstance(body, Mapping):
        body = body.get("message") or body.get("error") or body.get("detail") or ""
    return body if isinstance(body, str) else json.dumps(body)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the header Retry-After asks to wait, given as a number or as a date; None without one."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
