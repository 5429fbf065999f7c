"""The settings of an endpoint. Its key comes from the environment, so that no configuration or record can hold it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

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
        retries: how often a failed request is sent again, after growing waits or those of the header `Retry-After`.
        parameters: further keys of each request's body; null removes a key. Reasoning models of OpenAI need
            `{temperature: null, max_tokens: null, max_completion_tokens: 2000}`.

    Raises:
        DataError: no address or model, or an address that may contain a key.
    """

    url: str
    model: str
    key_variable: str = DEFAULT_KEY
    concurrency: PositiveInt = 16
    timeout: PositiveFloat = 120.0
    retries: NonNegativeInt = 8
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value, option in ((self.url, "--url"), (self.model, "--served-model")):
            if not value or value.startswith("${"):
                raise DataError(f"an endpoint needs an address and a model: {option} is not given")
        address = urlsplit(self.url)
        # Shown without what may be a key.
        shown = self.url.partition("?")[0].partition("#")[0].rpartition("@")[2]
        if address.scheme not in ("http", "https") or not address.hostname:
            raise DataError(f"--url: expected an address such as http://127.0.0.1:8000/v1, found {shown!r}")
        if address.username or address.password or address.query or address.fragment:
            raise DataError(
                f"--url {shown}: the address may hold neither a user nor parameters, since it is recorded: a key belongs "
                f"into the environment variable {self.key_variable}"
            )

    def key(self) -> str:
        """The key, from the environment.

        Raises:
            DataError: another variable than the default one is named and not set.
        """
        key = os.environ.get(self.key_variable, "").strip()
        if not key and self.key_variable != DEFAULT_KEY:
            raise DataError(f"endpoint.key_variable: the environment variable {self.key_variable} is not set")
        return key or UNKEYED
