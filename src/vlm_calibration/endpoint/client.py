"""Sends one request to an endpoint. The `openai` client repeats it after faults, waits as the server asks, and gives up in time."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from vlm_calibration.endpoint.settings import UNKEYED, Endpoint
from vlm_calibration.records import DataError

TOP = 20
"""Number of tokens that a server lists at each position, the most that OpenAI and vLLM allow by default."""
SHOWN = 300
"""Number of characters of a server's message in an error."""


class Token(NamedTuple):
    """A generated token.

    Attributes:
        text: its bytes; a token may be a part of a character.
        log_p: its log-probability.
        alternatives: the listed tokens at its position, itself included -> log-probability.
    """

    text: bytes
    log_p: float
    alternatives: Mapping[bytes, float]


class Response(NamedTuple):
    """A response to a request.

    Attributes:
        text: the generated text; empty for a response without one.
        tokens: its tokens; empty if the server lists none.
        generated: number of generated tokens; 0 if the server does not count them.
    """

    text: str
    tokens: tuple[Token, ...]
    generated: int


class RefusedError(DataError):
    """The server does not understand a request."""


class Client:
    """Asks one endpoint; thread-safe.

    Args:
        endpoint: the endpoint.
        name: of the system, for messages.

    Attributes:
        used: number of tokens of prompts and responses that the server has counted.

    Raises:
        DataError: the client library is not installed, or the key is not set.
    """

    def __init__(self, endpoint: Endpoint, name: str) -> None:
        if find_spec("openai") is None:
            raise DataError("an endpoint needs the package openai: pip install 'vlm-calibration[endpoint]'")
        from openai import OpenAI

        self.endpoint = endpoint
        self.name = name
        self.used = 0
        self._lock = threading.Lock()
        self._key = endpoint.key()
        self._api = OpenAI(
            base_url=endpoint.url, api_key=self._key, timeout=endpoint.timeout, max_retries=endpoint.retries
        )

    def ask(self, messages: Sequence[Mapping[str, Any]], max_tokens: int, **body: Any) -> Response:
        """The likeliest response to some messages.

        Args:
            messages: of the chat completions API.
            max_tokens: length limit of the response.
            body: further keys of the request; those of `Endpoint.parameters` take precedence.

        Raises:
            RefusedError: the server does not understand the request.
            DataError: it failed for good.
        """
        import openai

        body = {"max_tokens": max_tokens, "temperature": 0, **body, **self.endpoint.parameters}
        body = {key: value for key, value in body.items() if value is not None}
        create: Any = self._api.chat.completions.create
        try:
            answer = create(model=self.endpoint.model, messages=messages, extra_body=body)
        except openai.APIStatusError as error:
            said = f"status {error.status_code}"
            if error.status_code in (401, 403):
                state = "is not set" if self._key == UNKEYED else "holds the key that was sent"
                said += f" (the environment variable {self.endpoint.key_variable} {state})"
            kind = RefusedError if error.status_code in (400, 422) else DataError
            # Some servers repeat the key, so their message is in no traceback either.
            raise kind(self._about(f"{said}: {error.response.text}")) from None
        except openai.APITimeoutError as error:
            raise DataError(self._about(f"no response within {self.endpoint.timeout:g} s")) from error
        except openai.APIConnectionError as error:
            raise DataError(self._about(f"cannot be reached, or breaks off ({error.__cause__})")) from error
        except ValueError as error:
            raise DataError(self._about(f"answers with something other than JSON ({error})")) from error
        try:
            choice, usage = answer.choices[0], answer.usage
            listed = (choice.logprobs and choice.logprobs.content) or ()
            response = Response(
                choice.message.content or "",
                tuple(map(_token, listed)),
                usage.completion_tokens or 0 if usage else 0,
            )
        except (AttributeError, TypeError, IndexError) as error:
            raise DataError(
                self._about(f"answers with something other than a chat completion: {answer}")
            ) from error
        with self._lock:
            self.used += usage.total_tokens or 0 if usage else 0
        return response

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    def _about(self, message: str) -> str:
        """An error in one line, without the key."""
        line = " ".join(message.split())
        if self._key != UNKEYED:
            line = line.replace(self._key, "***")
        return f"{self.name} ({self.endpoint.model!r} at {self.endpoint.url}): {line[:SHOWN]}"


def _token(entry: Any) -> Token:
    alternatives = {_bytes(other): float(other.logprob) for other in entry.top_logprobs or ()}
    return Token(_bytes(entry), entry.logprob, {_bytes(entry): entry.logprob, **alternatives})


def _bytes(entry: Any) -> bytes:
    return entry.token.encode() if entry.bytes is None else bytes(entry.bytes)
