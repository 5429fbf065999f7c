"""An endpoint, and a client that sends requests to it, with the key from the environment so that no record can hold it."""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from vlm_calibration.records import DataError

DECIDING = ("model", "parameters")
"""The settings of an endpoint that decide its answers; a server may move to another address within a run."""
DEFAULT_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible address (vLLM, SGLang, llama.cpp, OpenAI and others).

    Args:
        url: address of the API, mostly ending in /v1.
        model: name under which the server knows the model.
        key_variable: environment variable with the key. The default one may be unset, for servers without keys.
        concurrency: maximum number of requests in flight, of each process.
        timeout: seconds until a request without a response counts as failed.
        retries: how often a failed request is sent again, after growing waits or as the header `Retry-After` says.
        parameters: further keys of each request's body; null removes a key. Reasoning models of OpenAI need
            `{temperature: null, max_tokens: null, max_completion_tokens: 2000}`.
    """

    url: str
    model: str
    key_variable: str = DEFAULT_KEY
    concurrency: PositiveInt = 16
    timeout: PositiveFloat = 120.0
    retries: NonNegativeInt = 8
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise a DataError without an address or a model, or for an address that may contain a key."""
        for value, option in ((self.url, "--url"), (self.model, "--served-model")):
            if not value or value.startswith("${"):
                raise DataError(f"an endpoint needs an address and a model: {option} is not given")
        address = urlsplit(self.url)
        shown = self.url.partition("?")[0].partition("#")[0].rpartition("@")[2]  # without what may be a key
        if address.scheme not in ("http", "https") or not address.hostname:
            raise DataError(f"--url: expected an address such as http://127.0.0.1:8000/v1, found {shown!r}")
        if address.username or address.password or address.query or address.fragment:
            rule = "the address may hold neither a user nor parameters, since it is recorded"
            advice = f"a key belongs into the environment variable {self.key_variable}"
            raise DataError(f"--url {shown}: {rule}: {advice}")


class Token(NamedTuple):
    """A generated token as bytes, since it may be a part of a character; `alternatives` are the listed tokens, itself included."""

    text: bytes
    log_p: float
    alternatives: Mapping[bytes, float]


class Response(NamedTuple):
    """A generated text, its tokens (empty if the server lists none), and their number (0 if it does not count them)."""

    text: str
    tokens: tuple[Token, ...]
    generated: int


class RefusedError(DataError):
    """The server does not understand a request."""


class Client:
    """Asks one endpoint; thread-safe. DataError: the client library is not installed, or the key is not set.

    Attributes:
        name: of the system, for messages.
        used: number of tokens of prompts and responses that the server has counted.
    """

    def __init__(self, endpoint: Endpoint, name: str) -> None:
        if find_spec("openai") is None:
            raise DataError("an endpoint needs the package openai: pip install 'vlm-calibration[endpoint]'")
        from openai import OpenAI

        self.endpoint, self.name = endpoint, name
        self.used = 0
        self._lock = threading.Lock()
        variable = endpoint.key_variable
        self._key = os.environ.get(variable, "").strip()
        if not self._key and variable != DEFAULT_KEY:
            raise DataError(f"endpoint.key_variable: the environment variable {variable} is not set")
        key = self._key or "none"  # the client does not work without one
        limits: dict[str, Any] = {"timeout": endpoint.timeout, "max_retries": endpoint.retries}
        self._api = OpenAI(base_url=endpoint.url, api_key=key, **limits)

    def ask(self, messages: Sequence[Mapping[str, Any]], max_tokens: int, **body: Any) -> Response:
        """The likeliest response to messages of the chat completions API; raises a RefusedError, or a DataError if it failed for good."""
        import openai

        body = {"max_tokens": max_tokens, "temperature": 0, **body, **self.endpoint.parameters}
        body = {key: value for key, value in body.items() if value is not None}
        create: Any = self._api.chat.completions.create
        try:
            answer = create(model=self.endpoint.model, messages=messages, extra_body=body)
        except openai.APIStatusError as error:
            said = f"status {error.status_code}"
            if error.status_code in (401, 403):
                state = "holds the key that was sent" if self._key else "is not set"
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
            tokens = tuple(map(_token, (choice.logprobs and choice.logprobs.content) or ()))
            generated = usage.completion_tokens or 0 if usage else 0
            response = Response(choice.message.content or "", tokens, generated)
        except (AttributeError, TypeError, IndexError) as error:
            problem = f"answers with something other than a chat completion: {answer}"
            raise DataError(self._about(problem)) from error
        with self._lock:
            self.used += usage.total_tokens or 0 if usage else 0
        return response

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    def _about(self, message: str) -> str:
        """An error in one line, without the key."""
        line = " ".join(message.split())
        if self._key:
            line = line.replace(self._key, "***")
        return f"{self.name} ({self.endpoint.model!r} at {self.endpoint.url}): {line[:300]}"


def _token(entry: Any) -> Token:
    listed = {_bytes(e): float(e.logprob) for e in (entry, *(entry.top_logprobs or ()))}
    return Token(_bytes(entry), entry.logprob, listed)


def _bytes(entry: Any) -> bytes:
    return entry.token.encode() if entry.bytes is None else bytes(entry.bytes)
