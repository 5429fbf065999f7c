"""The settings of an endpoint. Its key comes from the environment, so that no configuration or record can hold it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from vlm_calibration.records import DataError

DECIDING = ("model", "parameters")
"""The settings of an endpoint that decide its answers; a server may move to another address within a run."""
DEFAULT_KEY = "OPENAI_API_KEY"
UNKEYED = "none"
"""Sent as the key to a server for which no key is set; the client does not work without one."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible address (vLLM, SGLang, llama.cpp, OpenAI and others).

    Args:
        url: address of the API, mostly ending in /v1.
        model: name under which the server knows the model.
        key_variable: environment variable with the key. The default one may be unset, for servers without keys.
        concurrency: maximum number of requests in flight, of each process.
        timeout: seconds until a request without a response counts as failed.
        retries: how often a failed request is sent again. Waiting for a rate limit counts only while no request succeeds.
        backoff: seconds before the first retry; each further one waits twice as long, up to a minute, give or take half.
            `Retry-After` takes precedence.
        max_requests: maximum number of requests of a run and process, retries included; None: no limit.
        parameters: further keys of each request's body; null removes a key. Reasoning models of OpenAI need
            `{temperature: null, max_tokens: null, max_completion_tokens: 2000}`.
        reports_as: beginning of the model name in responses; None: that of `model`. A response of another model is a fault.

    Raises:
        DataError: an address that is none or contains a key, an unset variable, or a number out of range.
    """

    url: str
    model: str
    key_variable: str = DEFAULT_KEY
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 8
    backoff: float = 1.0
    max_requests: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    reports_as: str | None = None

    def __post_init__(self) -> None:
        for value, option in ((self.url, "--url"), (self.model, "--served-model")):
            if not value or value.startswith("${"):
                raise DataError(f"an endpoint needs an address and a model: {option} is not given")
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise DataError(
                f"--url: expected an address such as http://127.0.0.1:8000/v1, found {self._shown!r}"
            )
        if address.username or address.password or address.query or address.fragment:
            raise DataError(
                f"--url {self._shown}: the address may hold neither a user nor parameters, since it is recorded: a key belongs "
                f"into the environment variable {self.key_variable}"
            )
        least = {"concurrency": 1, "retries": 0, "max_requests": 1}
        for name, lowest in least.items():
            if (value := getattr(self, name)) is not None and value < lowest:
                raise DataError(f"endpoint.{name} must be at least {lowest}, found {value}")
        for name in ("timeout", "backoff"):
            if not 0 < getattr(self, name) < float("inf"):
                raise DataError(
                    f"endpoint.{name} must be a number of seconds above 0, found {getattr(self, name)}"
                )

    @property
    def _shown(self) -> str:
        """The address without what may be a key."""
        return self.url.partition("?")[0].partition("#")[0].rpartition("@")[2]

    @property
    def deciding(self) -> Mapping[str, Any]:
        """The settings that decide the answers."""
        return {name: getattr(self, name) for name in DECIDING}

    def key(self) -> str:
        """The key, from the environment.

        Raises:
            DataError: another variable than the default one is named and not set.
        """
        key = os.environ.get(self.key_variable, "").strip()
        if not key and self.key_variable != DEFAULT_KEY:
            raise DataError(f"endpoint.key_variable: the environment variable {self.key_variable} is not set")
        return key or UNKEYED
